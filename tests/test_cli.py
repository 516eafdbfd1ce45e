"""The command line, called as a user calls it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cbq.cli import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "tracking.mode=disabled",
    "calibration.num_segments=2",
    "calibration.segment_tokens=32",
    "reconstruction.epochs=1",
    "evaluation.corpora=[]",
]


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


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cbd.overlap=2"], "cbd.overlap must be 0 to 1"),
        (["cbd.window=9"], "cbd.window must be at most the model's 8 blocks, got 9"),
        (["cbd.window=0"], "cbd.window must be an integer of at least 1"),
        (["cbd.rounding_blocks=all"], "must be one of window, overlap"),
        (["quant=w5a5"], "must be one of w2a16, w2a16_star"),
        (["quant.weight_bit=3"], "did you mean quant.weight_bits?"),
        (["rouding=lora"], "did you mean rounding?"),
        (["+quant.extra=1"], "extra"),
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
        (["model=hf", "model.path=nobody/nothing-at-all"], "hub"),
        (["calibration=text", "calibration.segment_tokens=32"], "calibration.path is required"),
        (["calibration=text", "calibration.path=/no/file", "calibration.segment_tokens=32"], "/no/file"),
        (["calibration.segment_tokens=513"], "at most 512, the model's context"),
        (["calibration.num_segments=0"], "calibration.num_segments"),
        (["evaluation.corpora=[wiki]"], "wikitext2"),
        (["evaluation.text_path=/no/file"], "/no/file"),
        (["tracking.mode=loud"], "offline, online, disabled"),
        (["seed=-1"], "seed must be an integer"),
        (["quant=[1"], "no viable alternative"),
        (["model=hf", "model.path=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(cbq, tmp_path, overrides, said):
    quiet = [word for word in SMALL if not any(word.split("=")[0] == given.split("=")[0] for given in overrides)]
    code, _, error = cbq(*quiet, *overrides)
    assert code == 2
    lines = [line for line in error.splitlines() if line.startswith("cbq: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


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


def test_a_folder_remembers_its_run(cbq, tmp_path):
    folder = "hydra.run.dir=run"
    assert cbq(*SMALL, folder)[0] == 0
    first = (tmp_path / "run" / "results.json").read_text()
    code, output, _ = cbq("quantize", *SMALL, folder)
    assert code == 0
    assert "already finished" in output
    assert (tmp_path / "run" / "results.json").read_text() == first
    code, _, error = cbq(*SMALL, folder, "seed=1")
    assert code == 2
    assert "different configuration" in error
    (tmp_path / "run" / "results.json").write_text(first.replace('"finished"', '"running"'))
    code, _, error = cbq(*SMALL, folder)
    assert code == 2
    assert "not finished" in error
    code, _, _ = cbq(*SMALL, folder, "seed=1", "overwrite=true")
    assert code == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["seed"] == 1


def test_one_bad_cell_does_not_end_a_sweep(cbq, tmp_path):
    code, _, error = cbq("-m", *SMALL, "hydra.sweep.dir=sweep", "cbd.window=9,8,1")
    assert code == 2
    assert "job 0: cbd.window must be at most the model's 8 blocks" in error
    finished = {json.loads(path.read_text())["settings"]["cbd.window"] for path in tmp_path.rglob("results.json")}
    assert finished == {8, 1}


def test_a_fault_of_ours_shows_and_is_kept(cbq, tmp_path, monkeypatch):
    monkeypatch.setattr("cbq.runner.save_checkpoint", lambda *_: 1 / 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbq", *SMALL, "hydra.run.dir=run"])
    with pytest.raises(ZeroDivisionError):
        main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "failed"
    assert "ZeroDivisionError" in results["error"]
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()


@pytest.mark.parametrize("program", [[str(ROOT / "run.py")], ["-m", "cbq"]])
def test_from_another_directory(tmp_path, program):
    command = [sys.executable, *program, *SMALL, "cbd.window=8", "hydra.run.dir=run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert {"results.json", "config.yaml", "metrics.csv", "checkpoint"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    assert "\x1b" not in process.stdout
    assert process.stderr == ""
