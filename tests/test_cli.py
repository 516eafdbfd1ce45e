"""The command line, called as a user calls it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from safetensors import SafetensorError

from cbq.cli import main
from cbq.results import SCHEMA_PATH

ROOT = Path(__file__).resolve().parents[1]
QUIET = ["tracking.mode=disabled", "report=none"]
SHORT = [
    *QUIET,
    "calibration.num_segments=2",
    "calibration.segment_tokens=32",
    "evaluation.corpora=[]",
]
SMALL = [*SHORT, "reconstruction=none"]
LEARNED = [*SHORT, "reconstruction.epochs=1", "cbd.window=8"]  # one window


@pytest.fixture
def cbq(tmp_path, monkeypatch, capsys):
    """Return a function that runs `cbq` in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cbq", *words])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return exit_info.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def small(tiny_llama_folder, tiny_text_file) -> list[str]:
    """The options of a run that takes a second: rounding to nearest, of 4 blocks."""
    own = ["model=hf", f"model.path={tiny_llama_folder}", "calibration=text", f"calibration.path={tiny_text_file}"]
    return [*SMALL, *own]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cbd.overlap=2"], "cbd.overlap must be 0 to 1"),
        (["reconstruction.loss=x"], "reconstruction.loss is no value but a part of the configuration, got 'x'"),
        (["reconstruction.loss=null"], "reconstruction.loss is no value but a part of the configuration, got None"),
        (["cbd.window=9"], "cbd.window must be at most the model's 8 blocks, got 9"),
        (["cbd.window=0"], "cbd.window must be an integer of at least 1"),
        (["cbd.rounding_blocks=all"], "must be one of window, overlap"),
        (["quant=w5a5"], "must be one of w2a16, w2a16_star"),
        (["quant.weight_bit=3"], "did you mean quant.weight_bits?"),
        (["rouding=lora"], "did you mean rounding?"),
        (["+quant.extra=1"], "extra"),
        (["evaluation.baselines=none"], "evaluation.baselines must be true or false"),
        (["quant.weight_bits=9"], "quant.weight_bits must be 2 to 8, or 16"),
        (["quant.weight_bits=four"], "quant.weight_bits must be 2 to 8, or 16"),
        (["quant.act_bits=1"], "quant.act_bits must be 2 to 8, or 16"),
        (["quant.group_size=100"], "quant.group_size must divide the 256 input features, got 100"),
        (["rounding.rank=0"], "rounding.rank must be an integer of at least 1, got 0"),
        (["rounding.learning_rate=-1"], "rounding.learning_rate must be a number of at least 0"),
        (["reconstruction.epochs=0"], "reconstruction.epochs must be an integer of at least 1"),
        (["reconstruction.hard_start=0.1"], "warmup < hard_start"),
        (["loss.l2=0", "loss.kld=0"], "must be above 0"),
        (["model=hf"], "model.path is required"),
        (["model=hf", "model.path=/no/such/folder"], "is not a folder"),
        (["model=llama7b", "model.path=nobody/nothing-at-all"], "cbq: nobody/nothing-at-all is not in the local hub"),
        (["+model.path=x"], "unknown option 'model.path'"),
        (["calibration=text", "calibration.segment_tokens=32"], "calibration.path is required"),
        (["calibration=text", "calibration.path=/no/file", "calibration.segment_tokens=32"], "/no/file"),
        (["calibration.segment_tokens=513"], "at most 512, the model's context"),
        (["calibration.num_segments=0"], "calibration.num_segments"),
        (["evaluation.corpora=[wiki]"], "wikitext2"),
        (["evaluation.text_path=/no/file"], "/no/file"),
        (["activations.cache=ram"], "activations.cache must be one of auto, device, host, disk, got 'ram'"),
        (["activations.cach=disk"], "did you mean activations.cache?"),
        (["activations.folder=/no/folder"], "activations.folder must be a folder to write in"),
        (["activations.device_share=2"], "activations.device_share must be at most 1"),
        (["reconstruction.accumulate_grad_batches=0"], "accumulate_grad_batches must be an integer of at least 1"),
        (["method=gptr"], "'method/gptr' does not exist: it must be one of adaround, awq, cbq"),
        (["method=rtn", "rounding=lora"], "rounding means nothing with method=rtn: leave it out"),
        (["reconstruction=gptq", "rounding=lora"], "rounding means nothing with the other options: leave it out"),
        (["calibration.num_segments=1000000000000"], "calibration.num_segments must be at most 3125000 of 32 tokens"),
        (["tracking={a: 1}"], "option 'tracking.a' does not exist"),
        (["target=0"], "Config group override must be a string"),
        (["+model.los=1"], "unknown option 'model.los'"),
        (["runner.scheme=4"], "runner is made of the other options"),
        (["reconstruction.restart={_target_: nowhere.Nothing}"], "_target_ cannot be used"),
        (["reconstruction.descent.schedule.T_max=x"], "reconstruction.descent"),
        (["--nonsense"], "unrecognized arguments"),
        (["hydra.run.dir=${nowhere}"], "nowhere"),
        (["method=rtn", "rounding.rank=3"], "rounding.rank"),
        (["method=awq", "quant=w4a4"], "method=awq is for weights only: quant.act_bits must be 16, got 4"),
        (
            ["method=awq", "quant=w4a16", "quant.qkv_bits=4"],
            "method=awq is for weights only: quant.qkv_bits must be 16",
        ),
        (["method=smoothquant", "quant=w4a16"], "method=smoothquant is for activations too"),
        (["method=os_plus", "quant=w4a16"], "method=os_plus is for activations too"),
        (["reconstruction.epochs=null", "reconstruction.num_steps=0"], "num_steps must be an integer of at least 1"),
        (["reconstruction.num_steps=9"], "must be null, the other not, got 3 and 9"),
        (["method=signround", "reconstruction.epochs=5"], "must be null, the other not, got 5 and 200"),
        (["reconstruction.keep_best=no"], "reconstruction.keep_best must be true or false"),
        (["reconstruction.act_range_gradient=1"], "reconstruction.act_range_gradient must be true or false"),
        (["debug=profil"], "'debug/profil' does not exist: it must be one of fast, none, profile"),
        (["debug=profile", "debug.profile.batch=1"], "did you mean debug.profile.batches?"),
        (["debug=profile", "debug.profile.skip=-1"], "debug.profile.skip must be an integer of at least 0"),
        (["debug.profile=true"], "debug=profile turns it on"),
        (["tracking.mode=loud"], "offline, online, disabled"),
        (["verbosity=loud"], "verbosity must be one of quiet, normal, verbose"),
        (["seed=-1"], "seed must be an integer"),
        (["reconstruction.seed=%"], "seed must be an integer"),
        (["overwrite=no"], "overwrite must be true or false, got 'no'"),
        (["reconstruction.restart=no"], "reconstruction.restart must be true or false"),
        (["model=hf", "model.path=x/y", "model.trust_remote_code=no"], "model.trust_remote_code must be true or false"),
        (["model=hf", "model.path=null"], "model.path must be a text"),
        (["model.prompt=''"], "model.prompt must be a text"),
        (["calibration=text", "calibration.path=5"], "calibration.path must be a text"),
        (["evaluation.text_path=5"], "evaluation.text_path must be a text or null"),
        (["evaluation.corpora=5"], "evaluation.corpora must be a list"),
        (["tracking.entity=5"], "tracking.entity must be a text or null"),
        (["tracking.mode=offline", "tracking.project=a/b"], "tracking.project must not contain"),
        (["tracking.mode=online"], "wandb login"),
        (["model=pico_outliers", "model.factor=inf"], "model.factor must be a number of at least 1"),
        (["model=pico_outliers", "model.seed=abc"], "model.seed must be an integer"),
        (["preprocess=cfp", "preprocess.lambda1=nan"], "preprocess.lambda1 must be a number"),
        (["preprocess=cfp", "preprocess.lamda1=2"], "did you mean preprocess.lambda1?"),
        (["reconstruction.learning_rates.weight_scale=inf"], "learning_rates.weight_scale must be a number"),
        (["model=hf", "model.pth=x"], "did you mean model.path?"),
        (["rounding=dense_ste", "rounding.rank=4"], "it must be one of rounding.learning_rate"),
        (["+rouding=x"], "unknown option 'rouding': did you mean rounding?"),
        (["quant.overrides=5"], "quant.overrides must be a list"),
        (["quant.overrides=null"], "quant.overrides must be a list"),
        (["quant.overrides=[{linears: .*}]"], "sets nothing"),
        (["quant.overrides=[{linears: down, weight_bits: 4}]"], "is the name of no linear"),
        (["hydra.run.dir=/proc/nothing"], "/proc/nothing"),
        ([""], "mismatched input"),
        (["quant=[1"], "no viable alternative"),
        (["model=hf", "model.path=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(cbq, tmp_path, overrides, said):
    quiet = [word for word in SHORT if not any(word.split("=")[0] == given.split("=")[0] for given in overrides)]
    code, _, error = cbq(*quiet, *overrides)
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith("cbq: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["", "a", "a/b", "a/b/run"])
def test_a_refused_run_removes_only_what_it_made(cbq, tmp_path, there):
    """Not even the empty folder that it is started in."""
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    code, _, _ = cbq(*SMALL, "hydra.run.dir=a/b/run", "cbd.window=9")
    assert code == 2
    assert tmp_path.is_dir()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["quantize", "evaluate", "analyze", "export", "generate"])
@pytest.mark.parametrize("word", ["model=null", "~model"])
def test_no_model_is_one_line(cbq, tmp_path, command, word):
    """Hydra's own line was that a choice must be a string, not of what; nor is there a line of its own before it."""
    (tmp_path / "run").mkdir()
    words = ["run"] if command in ("export", "generate") else []
    code, _, error = cbq(command, *words, word)
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith("cbq: ")
    assert word == "~model" or line.startswith("cbq: model must be one of bloom"), line


def test_too_little_room_for_the_streams(cbq, tmp_path, monkeypatch):
    monkeypatch.setattr("cbq.streams.places.free_disk_bytes", lambda folder: 100_000)
    code, _, error = cbq(*SMALL, "activations.cache=disk")
    assert code == 2
    (line,) = error.splitlines()
    assert "activations.cache=disk: 2 streams take 0.000122 GiB of disk, and 9.31e-05 GiB are free" in line
    assert list(tmp_path.iterdir()) == []


def test_debug_fast(cbq, tmp_path):
    """What `debug` says wins over other groups, and what the user types wins over it."""
    assert cbq(*QUIET, "debug=fast", "reconstruction=none", "hydra.run.dir=run")[0] == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["cost"]["calibration_tokens"] == 4 * 64
    assert results["perplexity"] == {}
    assert (results["settings"]["reconstruction"], results["settings"]["debug"]) == ("none", "fast")


def test_a_text_shorter_than_a_segment(cbq, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    code, _, error = cbq(*SMALL[:-1], "evaluation.text_path=short.txt")
    assert code == 2
    assert "less than one segment of 512" in error


def test_a_damaged_model(cbq, tmp_path, tiny_llama_folder):
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, error = cbq(*SMALL, "calibration=embedded", "model=hf", "model.path=model", "evaluation=none")
    assert code == 2
    assert "safetensors" in error
    assert "Traceback" not in error


def test_help_and_unknown_commands(cbq):
    code, output, _ = cbq("--help")
    assert code == 0
    assert "quantize" in output
    code, _, error = cbq("quantise")
    assert code == 2
    assert "must be one of quantize" in error


def test_a_folder_remembers_its_run(cbq, small, tmp_path):
    folder = "hydra.run.dir=run"
    assert cbq(*small, folder)[0] == 0
    first = (tmp_path / "run" / "results.json").read_text()
    code, output, _ = cbq("quantize", *small, folder)
    assert code == 0
    assert "already finished" in output
    assert (tmp_path / "run" / "results.json").read_text() == first
    code, _, error = cbq(*small, folder, "seed=1")
    assert code == 2
    assert "different configuration" in error
    (tmp_path / "run" / "results.json").write_text(first.replace('"finished"', '"running"'))
    assert cbq(*small, folder)[0] == 0  # a run that ended half-way starts anew
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "finished"
    code, _, _ = cbq(*small, folder, "seed=1", "overwrite=true")
    assert code == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seed"] == 1


def test_one_bad_cell_does_not_end_a_sweep(cbq, small, tmp_path):
    code, _, error = cbq("-m", *small, "hydra.sweep.dir=sweep", "cbd.window=5,4,1,6")
    assert code == 2
    assert "job 0: cbd.window must be at most the model's 4 blocks" in error
    assert error.splitlines()[-1] == "cbq: failed jobs: 0, 3; the others are done"
    cells = [json.loads(path.read_text()) for path in tmp_path.rglob("results.json")]
    statuses = {results["settings"]["cbd.window"]: results["status"] for results in cells}
    assert statuses == {4: "finished", 1: "finished", 5: "failed", 6: "failed"}
    assert cbq("report", "sweep")[0] == 0
    rows = (tmp_path / "sweep" / "report.md").read_text().splitlines()
    assert sum(row.count("failed") > 0 for row in rows) == 2


def test_a_failed_cell_of_a_sweep_says_what_it_is(cbq, tmp_path):
    """Also where it fails before there is a model; the same command tries it again."""
    words = ["model=hf", "model.path=nobody/nothing", "method=rtn,gptq", "rounding=lora"]
    for _ in range(2):
        code, _, error = cbq("-m", *SMALL, "hydra.sweep.dir=sweep", *words)
        assert code == 2
        assert "already finished" not in error
        cells = [json.loads(path.read_text()) for path in tmp_path.rglob("results.json")]
        assert {results["method"] for results in cells} == {"rtn", "gptq"}
        for results in cells:
            jsonschema.validate(results, json.loads(SCHEMA_PATH.read_text()))
            assert results["status"] == "failed"
            assert results["model"] == "nobody/nothing"
            assert "rounding means nothing with method=" in results["error"]


def test_a_failed_start_never_removes_a_finished_run(cbq, small, tmp_path):
    """Not even with overwrite=true, which would have removed it at the start."""
    words = ["-m", *small, "hydra.sweep.dir=sweep", "hydra.sweep.subdir=cell"]
    assert cbq(*words, "cbd.window=4")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "sweep" / "cell").rglob("*") if path.is_file()}
    code, _, error = cbq(*words, "cbd.window=5", "overwrite=true")
    assert code == 2
    assert "cbd.window must be at most" in error
    assert {path: path.read_bytes() for path in (tmp_path / "sweep" / "cell").rglob("*") if path.is_file()} == before


def cells_by(folder: Path, key: str) -> dict[object, Path]:
    """Return the results of all runs below a folder by one of their settings, in its order."""
    found = {json.loads(path.read_text())["settings"][key]: path for path in folder.rglob("results.json")}
    return dict(sorted(found.items()))


def test_a_table_goes_on_where_it_was_left(cbq, small, tmp_path):
    """The same command again: finished cells are skipped, a cell that was interrupted runs anew."""
    table = ["-m", *small, "experiment=glob(table15_*)"]
    assert cbq(*table)[0] == 0
    cells = cells_by(tmp_path / "multirun" / "table15", "experiment")
    assert list(cells) == ["table15_cbd", "table15_cfp"]
    cells = list(cells.values())
    first = [path.read_text() for path in cells]
    cells[0].write_text(first[0].replace('"finished"', '"running"'))
    code, output, _ = cbq(*table)
    assert code == 0
    assert output.count("already finished") == 1
    assert json.loads(cells[0].read_text())["status"] == "finished"
    assert cells[1].read_text() == first[1]


def test_a_sweep_goes_on_where_it_was_left(cbq, small, tmp_path):
    """Also without experiments, and typed in another order."""
    sweep = [*small, "cbd.window=1,2"]
    assert cbq("-m", *sweep)[0] == 0
    cells = cells_by(tmp_path / "multirun", "cbd.window")
    assert list(cells) == [1, 2]
    cells = list(cells.values())
    first = [path.read_text() for path in cells]
    cells[0].write_text(first[0].replace('"finished"', '"running"'))
    code, output, _ = cbq("-m", "verbosity=quiet", *reversed(sweep))
    assert (code, output.count("already finished")) == (0, 1)
    assert json.loads(cells[0].read_text())["status"] == "finished"
    assert cells[1].read_text() == first[1]
    assert set((tmp_path / "multirun").glob("*/*/results.json")) == set(cells)


def test_a_fault_of_ours_shows_and_is_kept(cbq, small, tmp_path, monkeypatch):
    monkeypatch.setattr("cbq.runner.save_checkpoint", lambda *_: 1 / 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbq", *small, "hydra.run.dir=run"])
    with pytest.raises(ZeroDivisionError):
        main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "failed"
    assert "ZeroDivisionError" in results["error"]
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()


def test_a_full_disk_is_one_line_and_how_to_go_on(cbq, small, tmp_path, monkeypatch):
    """Also where a library in Rust wrote, whose errors have no number."""

    def full(*args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("cbq.runner.save_checkpoint", full)
        code, _, err = cbq(*small, "hydra.run.dir=run")
    assert code == 2
    assert f"cbq: to go on: cbq resume={tmp_path / 'run'}\ncbq: cannot write: No space left on device" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "failed"
    assert cbq(*small, "hydra.run.dir=run")[0] == 0


@pytest.mark.parametrize(
    "program", [[str(ROOT / "run.py")], pytest.param(["-m", "cbq"], marks=pytest.mark.slow)], ids=["run.py", "-m cbq"]
)
def test_from_another_directory(small, tmp_path, program):
    command = [sys.executable, *program, *small, "hydra.run.dir=run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert {"results.json", "config.yaml", "metrics.csv", "checkpoint"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert "\x1b" not in process.stdout
    assert process.stderr == ""


def test_settings_name_every_choice(cbq, tmp_path):
    options = ["rounding=lora_ste", "preprocess=cfp_weight", "cbd=blockwise", "calibration.num_segments=1"]
    assert cbq(*SHORT, *options, "reconstruction.epochs=1", "hydra.run.dir=run")[0] == 0
    settings = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
    assert settings["rounding"] == "lora_ste"
    assert settings["preprocess"] == "cfp_weight"
    assert (settings["model"], settings["quant"], settings["cbd"]) == ("pico", "w2a16", "blockwise")
    assert settings["rounding.rank"] == 5
    assert "tracking" not in settings


def test_sweep_folders_stay_inside_the_sweep(cbq, tmp_path):
    """Also with a path among the overrides, and with more of them than a folder's name can hold."""
    (tmp_path / "a.txt").write_text("Some text. " * 200)
    many = [f"reconstruction.{key}=1" for key in ("compensation_weight", "homologous_weight")]
    many += ["reconstruction.learning_rates.weight_scale=0.0012345", "reconstruction.learning_rates.act_scale=0.00012"]
    many += ["reconstruction.beta_start=19.123456", "reconstruction.beta_end=2.123456", "reconstruction.warmup=0.21"]
    options = ["calibration=text", "calibration.path=../../a.txt,../../../x/../a.txt", "calibration.segment_tokens=16"]
    words = [word for word in LEARNED if "segment_tokens" not in word]
    cbq("-m", *words, *options, *many, "hydra.sweep.dir=sweep/one")
    folders = [path for path in (tmp_path / "sweep" / "one").iterdir() if path.is_dir()]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["sweep"]
    assert len({path.name for path in folders}) == len(folders)
    assert all(len(path.name) <= 200 for path in folders)


def test_evaluate_from_the_command_line(cbq, tmp_path):
    """A model, a mistyped option, and one that nothing reads."""
    options = ["evaluation.text_path=short.txt", "evaluation.segment_tokens=64", "evaluation.agreement_tokens=0"]
    (tmp_path / "short.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    code, output, _ = cbq("evaluate", "model=pico", *options, "hydra.run.dir=measured")
    assert code == 0
    assert "perplexity of pico on text" in output
    measured = json.loads((tmp_path / "measured" / "evaluation.json").read_text())
    assert measured["perplexity"]["text"]["full_precision"] > 1
    assert "did you mean checkpoint?" in cbq("evaluate", "checkpont=x")[2]
    code, _, error = cbq("evaluate", "model=pico", *options, "+foo=1")
    assert (code, error.count("\n")) == (2, 1)
    assert "unknown option 'foo'" in error
    code, _, error = cbq("evaluate", "nowhere", "model=pico")
    assert code == 2
    assert "checkpoint 'nowhere' is not a folder" in error
