"""Files of somebody else's: nothing in them is run, nothing outside their folder is read, and damage is one line."""

import gzip
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
import yaml
from reliability.broken_folders import CHECKPOINT_BREAKERS, INDEX, MODEL_BREAKERS, WEIGHTS, shard
from safetensors.torch import load_file

import cbq
from cbq.checkpoint import find_any, find_checkpoint, load_any, load_checkpoint
from cbq.cli import main
from cbq.cli.resume import command_of
from cbq.data.benchmarks import load_benchmark
from cbq.data.calibration import calibrate_on_c4, calibrate_on_text, calibrate_on_wikitext2
from cbq.errors import InputError
from cbq.evaluation.recall import Recall
from cbq.models.loading import load_pretrained
from cbq.quant.scheme import QuantScheme
from cbq.results import read_results, write_results

IDS = torch.arange(24).view(2, 12)


class Code:
    """What a pickle can do to whoever reads it: here it leaves a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return Path.touch, (self.proof,)


@pytest.fixture
def proof(tmp_path: Path) -> Iterator[Path]:
    """Return the file that code of a stranger's would leave; after the test it must not be there."""
    path = tmp_path / "code was run"
    yield path
    assert not path.exists()


@pytest.fixture
def folder(tmp_path: Path, tiny_llama_folder: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A run's folder with a W4A8 checkpoint."""
    path = tmp_path_factory.mktemp("run")
    loaded = load_pretrained(str(tiny_llama_folder))
    tokens = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    cbq.quantize(loaded.model, tokens, scheme=QuantScheme(4, 8), epochs=1, progress=False)
    cbq.save(loaded.model, loaded.tokenizer, path / "checkpoint")
    return path


@pytest.fixture
def run_folder(tmp_path: Path, whole_run: Path) -> Path:
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


@pytest.fixture
def program(tmp_path, monkeypatch, capsys) -> Callable:
    """Return a function that runs `cbq` in an empty folder: exit code and standard error."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))  # who is asked says yes

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cbq", *words])
        with pytest.raises(SystemExit) as exit_info:
            main()
        return exit_info.value.code, capsys.readouterr().err

    return run


# --- no pickle


def test_the_planted_pickle_works(tmp_path) -> None:
    """Otherwise the tests below say nothing."""
    pickle.loads(pickle.dumps(Code(tmp_path / "run")))
    assert (tmp_path / "run").exists()


PICKLED_FILES = (
    *("pytorch_model.bin", "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "tokenizer.model", "vocab.json", "special_tokens_map.json", "adapter_model.bin"),
    *("training_args.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json", "cbq/quantized.safetensors"),
)


PICKLES: dict[str, Callable[[Code, Path], object]] = {
    "pickle": lambda code, path: path.write_bytes(pickle.dumps({"lm_head.weight": code})),
    "torch": lambda code, path: torch.save({"lm_head.weight": code}, path),
    "old torch": lambda code, path: torch.save(code, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize(
    "name", [PICKLED_FILES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PICKLED_FILES[1:])]
)
@pytest.mark.parametrize("alone", [False, True])
def test_no_file_of_a_model_folder_is_unpickled(run_folder, proof, kind, name, alone) -> None:
    """Whatever it is called, beside the weights and in their place; of a checkpoint of cbq and of any other folder."""
    path = run_folder / "checkpoint"
    if alone:
        (path / WEIGHTS).unlink()
    PICKLES[kind](Code(proof), path / name)
    for load in (load_checkpoint, load_any, lambda folder: load_pretrained(str(folder))):
        if alone:
            with pytest.raises(InputError):
                load(path)
        else:
            with suppress(InputError):
                load(path)


@pytest.mark.parametrize("index_names", ["weights.bin", "pytorch_model-1.bin", "x.safetensors"])
def test_no_file_that_an_index_names_is_unpickled(folder, proof, index_names) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"lm_head.weight": Code(proof)}, folder / index_names)
    for index in ("pytorch_model.bin.index.json", INDEX):
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": index_names}}))
    for load in (load_any, lambda path: load_pretrained(str(path))):
        with pytest.raises(InputError):
            load(folder)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_no_data_file_is_unpickled(tmp_path, proof, suffix) -> None:
    content = pickle.dumps(Code(proof))
    for name in ("en/c4-train.00000-of-01024.json.gz", "train-00000-of-00001.parquet", "text.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(content) if suffix else content)
    for corpus in (
        calibrate_on_c4(str(tmp_path), 1, 4),
        calibrate_on_wikitext2(str(tmp_path), 1, 4),
        calibrate_on_text(str(tmp_path / "text.txt"), 1, 4),
    ):
        with pytest.raises(InputError):
            corpus.sample(lambda text, **_: {"input_ids": list(range(100))}, 200, 100, 0)
    for name in ("piqa", "hellaswag", "arc_easy", "ethics_cm", "anything"):
        for file in ("piqa/valid.jsonl", "hellaswag/hellaswag_val.jsonl", "ethics/commonsense/cm_test.csv"):
            (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / file).write_bytes(content)
        for file in ("test.parquet", "validation.jsonl"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(content)
        with pytest.raises(InputError):
            load_benchmark(name, str(tmp_path))


def test_no_remembered_score_is_unpickled(tmp_path, proof) -> None:
    recall = Recall(tmp_path, ("model",))
    assert recall(("text",), lambda: 1.5) == 1.5
    (file,) = tmp_path.glob("*.json")
    file.write_bytes(pickle.dumps(Code(proof)))
    assert recall(("text",), lambda: 2.5) == 2.5
    (tmp_path / "results.json").write_bytes(pickle.dumps(Code(proof)))
    with pytest.raises(InputError):
        read_results(tmp_path)


# --- no code of a checkpoint's


def add_code(folder: Path, proof: Path, model_type: str) -> None:
    """Let a folder bring classes of its own for everything, which leave a file where they are imported."""
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\nclass Evil: pass\n")
    names = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"}
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / file).read_text())
        content["auto_map"] = dict.fromkeys(names, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
        if file == "config.json":
            content["model_type"] = model_type
            content["architectures"] = ["Evil"]
        (folder / file).write_text(json.dumps(content))
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate" / "generate.py")


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_that_comes_with_a_checkpoint_is_not_run(run_folder, tiny_llama_folder, proof, program, model_type):
    """Not even where a terminal is asked and says yes."""
    plain = Path(shutil.copytree(tiny_llama_folder, run_folder.parent / "plain"))
    for path in (plain, run_folder / "checkpoint"):
        add_code(path, proof, model_type)
    text = run_folder.parent / "text.txt"
    text.write_text("Some text. " * 50)
    measured = [f"evaluation.text_path={text}", "evaluation.segment_tokens=16", "evaluation.cache_dir=null"]
    expected = 0 if model_type == "llama" else 2
    for words in (
        ("evaluate", f"checkpoint={plain}", *measured),
        ("evaluate", f"checkpoint={run_folder}", *measured),
        ("evaluate", "model=hf", f"model.path={plain}", *measured),
        ("generate", str(run_folder), "prompt=a", "max_tokens=2"),
    ):
        code, error = program(*words)
        assert code == expected, words
        assert error.count("\n") == (code == 2), words


def test_the_task_harness_runs_no_code_of_a_checkpoint(folder, proof) -> None:
    from cbq.evaluation.harness import HarnessModel

    add_code(folder, proof, "llama")
    loaded = load_any(folder)
    model = HarnessModel(loaded, 64, lambda key, compute: compute(), lambda elements, what: elements)
    assert model._loglikelihood_tokens([(("a", "b"), [1, 2], [3])])[0][0] < 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"_target_": "os.system", "command": "touch PROOF"}, "names code to run"),
        ({"_target_": "pathlib.Path.touch", "_args_": ["PROOF"]}, "names code to run"),
        ({"_target_": "cbq.models.loading.load_embedded", "name": {"_target_": "os.system"}}, "names code to run"),
        ({"_target_": "cbq.models.loading.load_pretrained", "path": "x", "trust_remote_code": True}, "run code"),
        ({"_target_": "cbq.models.loading.load_pretrained", "path": "x/${oc.env:HOME}"}, "computes model.path"),
        ({"path": "x"}, "does not say which model"),
        ([1], "does not say which model"),
        (None, "does not say which model"),
    ],
)
def test_a_stored_configuration_names_no_code(run_folder, proof, program, model, said) -> None:
    """`compare=true` reads which model a run was made of."""
    text = yaml.safe_dump({"model": model}).replace("PROOF", str(proof))
    (run_folder / "config.yaml").write_text(text)
    code, error = program("generate", str(run_folder), "prompt=a", "max_tokens=1", "compare=true")
    assert code == 2
    assert error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch PROOF']", "model: !!python/name:os.system", "a: &a [*a]", "\x00", "["],
)
def test_a_stored_configuration_is_data(run_folder, proof, program, text) -> None:
    (run_folder / "config.yaml").write_text(text.replace("PROOF", str(proof)))
    code, error = program("generate", str(run_folder), "prompt=a", "max_tokens=1", "compare=true")
    assert (code, error.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    "word",
    [
        "model._target_=os.system",
        "++tracking={_target_: os.system, command: id}",
        "+x=[{_target_: os.system}]",
        "model.trust_remote_code=true",
        "model.path=somebody/${oc.env:HOME}",
        "hydra.launcher=x",
        "-m",
        "--config-dir=/tmp",
    ],
)
def test_a_stored_command_line_names_no_code(tmp_path, word) -> None:
    """`resume=` and `cbq reproduce` type again what `results.json` says was typed."""
    write_results(tmp_path, {"status": "running", "overrides": ["quant=w4a4", word], "working_folder": "/"})
    with pytest.raises(InputError, match="names code or hydra options"):
        command_of(tmp_path)


# --- no file outside


@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "./model.safetensors"])
@pytest.mark.parametrize("load", [load_any, load_pretrained], ids=["any", "full precision"])
def test_an_index_does_not_reach_outside(folder, name, load) -> None:
    weight_map = shard(folder)
    outside = shutil.copy(folder / weight_map["lm_head.weight"], folder.parent / "outside.safetensors")
    weight_map["lm_head.weight"] = str(outside) if name == "ABSOLUTE" else name
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(InputError, match="is the name of no weight file"):
        load(str(folder)) if load is load_pretrained else load(folder)


def test_links_are_followed_as_the_cache_of_the_hub_has_them(folder) -> None:
    (folder / WEIGHTS).rename(folder.parent / "blob")
    (folder / WEIGHTS).symlink_to(folder.parent / "blob")
    assert torch.isfinite(load_pretrained(str(folder)).model(IDS).logits).all()


@pytest.mark.parametrize(
    ("name", "refused"), [("notes.txt", False), ("training_args.bin", False), ("special_tokens_map.json", True)]
)
@pytest.mark.parametrize("load", [load_any, load_pretrained], ids=["any", "full precision"])
def test_a_link_that_leads_nowhere_is_refused_where_the_file_would_be_read(folder, name, refused, load) -> None:
    """As of a download that was cut short: without the file the model could be another one."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=f"holds {name}, which is neither") if refused else nullcontext():
        load(str(folder)) if load is load_pretrained else load(folder)


@pytest.mark.parametrize("name", ["config.json", "special_tokens_map.json", "notes.txt"])
def test_a_pipe_is_not_waited_for(folder, name) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for load in (load_any, lambda path: load_pretrained(str(path))):
        with pytest.raises(InputError):
            load(folder)


def test_names_of_linears_stay_inside_the_model(run_folder) -> None:
    """What a checkpoint calls a linear is looked up among modules, and nowhere else."""
    for name in ("quantized file with a linear that is a private name", "quantized file with a linear with dots"):
        broken = Path(shutil.copytree(run_folder, run_folder.parent / name))
        CHECKPOINT_BREAKERS[name](broken / "checkpoint")
        with pytest.raises(InputError, match="damaged checkpoint"):
            load_checkpoint(broken / "checkpoint")


# --- damage


def outcome(load: Callable[[], object], capfd: pytest.CaptureFixture) -> str | None:
    """Return the one line that refuses a folder, or None: it was loaded, and computes numbers."""
    capfd.readouterr()
    try:
        loaded = load()
    except InputError as error:
        line = str(error)
        assert line
        assert "\n" not in line
        assert "".join(capfd.readouterr()) == ""
        return line
    assert "".join(capfd.readouterr()) == ""
    with torch.no_grad():
        loaded.model(IDS)
    return None


SOME = 8


def some(breakers: dict) -> list:
    """Return a few of many, spread evenly, and all others as slow ones."""
    names = list(breakers)
    few = set(names[:: max(1, len(names) // SOME)])
    return [pytest.param(name, marks=() if name in few else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some(MODEL_BREAKERS))
def test_a_broken_model_folder_is_one_line_or_a_model(folder, name, capfd) -> None:
    MODEL_BREAKERS[name](folder)
    for load in (lambda: load_pretrained(str(folder)), lambda: load_any(find_any(str(folder)))):
        outcome(load, capfd)


@pytest.mark.parametrize("name", some(CHECKPOINT_BREAKERS))
def test_a_broken_checkpoint_is_one_line_or_computes_the_same(run_folder, whole_run, name, capfd) -> None:
    """Also of one bit: a checkpoint knows its own."""
    CHECKPOINT_BREAKERS[name](run_folder / "checkpoint")
    expected = load_checkpoint(whole_run / "checkpoint").model
    for load in (
        lambda: load_checkpoint(find_checkpoint(str(run_folder))),
        lambda: load_any(find_any(str(run_folder))),
    ):
        loaded: list = []
        line = outcome(lambda load=load, loaded=loaded: loaded.append(load()) or loaded[0], capfd)
        if line is None and "multiplier" not in name:  # a number that could be right
            with torch.no_grad():
                assert torch.equal(loaded[0].model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("name", ["a NaN", "an infinity"])
@pytest.mark.parametrize("load", [load_any, load_pretrained], ids=["any", "full precision"])
def test_a_parameter_that_is_no_number_is_named(folder, name, load) -> None:
    MODEL_BREAKERS[f"weights with {name}"](folder)
    wanted = {"a NaN": r"model\.layers\.1\.mlp\.down_proj\.weight", "an infinity": r"lm_head\.weight"}[name]
    with pytest.raises(InputError, match=f"not finite.*{wanted}"):
        load(str(folder)) if load is load_pretrained else load(folder)


def test_a_pickle_of_tensors_is_still_read(folder) -> None:
    """As OPT's."""
    expected = load_pretrained(str(folder)).model(IDS).logits
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    assert torch.equal(load_pretrained(str(folder)).model(IDS).logits, expected)
