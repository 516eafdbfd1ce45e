"""A run that is interrupted after a window and goes on ends as one that never was, to the bit."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import AutoTokenizer

from cbq.cli import conf_dir, flatten
from cbq.cli.commands import was_finished
from cbq.errors import InputError
from cbq.report.reproduction import figures, weights
from cbq.run_folder import RunFolder
from cbq.state import generations
from cbq.state.random import random_states, set_random_states

# What carries most from window to window: learned roundings and step sizes, folded scales, gains, given integers.
CASES = {
    "cbq": ["method=cbq", "quant=w4a4", "preprocess=cfp", "reconstruction.epochs=2"],
    "gptq": ["method=gptq", "quant=w2a16"],
}
SLOW_CASES = {
    "omniquant": ["method=omniquant", "quant=w4a4", "reconstruction.epochs=2"],
    "cbq_best-w2a16": ["method=cbq_best", "quant=w2a16"],
    "cbq_best-w4a4": ["method=cbq_best", "quant=w4a4"],
    "signround": ["method=signround", "quant=w2a16", "cbd.window=3", "cbd.overlap=2"],
    "adaround": ["method=adaround", "quant=w4a4"],
    "awq": ["method=awq", "quant=w4a16"],
    "smoothquant": ["method=smoothquant", "quant=w4a4"],
    "os_plus": ["method=os_plus", "quant=w4a4"],
    "rtn": ["method=rtn", "quant=w2a16"],
    "cbq-adaround": ["quant=w4a4", "rounding=adaround", "quant.qkv_bits=4"],
    "cbq-static": ["quant=w4a4", "quant.act_granularity=tensor", "rounding=lora_ste"],
    "cbq-groups": ["quant=w2a16", "quant.group_size=32", "rounding=dense_ste", "activations.cache=disk"],
    "cbq-homologous": ["quant=w2a16", "reconstruction.homologous_weight=0.5"],
    "cbq-gains": ["quant=w2a16", "rounding=dense_ste", "reconstruction.learning_rates.norm=1e-3"],
    "cbq-from-gptq": ["quant=w2a16", "rounding=dense_ste", "reconstruction=from_gptq"],
}


FULL = OSError(28, "No space left on device")


class Killed(Exception):
    """Stands for the end of the process."""


def compose_run(model: Path, overrides: list[str]) -> dict:
    small = ["tracking.mode=disabled", "report=none", "calibration=text", "calibration.num_segments=4"]
    small += ["calibration.segment_tokens=32", "evaluation.segment_tokens=32", "evaluation.agreement_tokens=64"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("config", overrides=["model=hf", f"model.path={model}", *small, *overrides])


def run(folder: Path, config: dict, commits: int | None = None, failing: int | None = None, **changes: object) -> dict:
    """Run in this process, up to the end of the given number of commits, one of which fails; return the results."""
    real, done = generations.Generations.commit, []

    def commit(self, *args, **kwargs) -> None:
        done.append(1)
        if len(done) == failing:
            raise FULL
        real(self, *args, **kwargs)
        if len(done) == commits:
            raise Killed

    run_folder = RunFolder(folder, config, **changes)
    assert not run_folder.is_finished()
    runner = instantiate(config.runner, folder=run_folder, settings=flatten(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generations.Generations, "commit", commit)
        try:
            runner.run()
        except Killed:
            assert commits
        except BaseException as error:
            runner.fail(error)
            raise
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def text(tmp_path_factory, tiny_text_file) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text_file.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def check_resumed(tmp_path: Path, config: dict, commits: int) -> None:
    whole = run(tmp_path / "whole", config)
    left = run(tmp_path / "parts", config, commits)
    assert left["status"] == "running"
    torch.manual_seed(12345)  # another process would draw other numbers
    random.seed(12345)
    resumed = run(tmp_path / "parts", config)
    assert resumed["status"] == "finished"
    found = figures(whole, resumed) + weights(tmp_path / "whole" / "checkpoint", tmp_path / "parts" / "checkpoint")
    assert len(found) > 40
    assert [figure for figure in found if not figure.same] == []
    for name in ("metrics.csv", "blocks.csv"):
        files = [folder / name for folder in (tmp_path / "whole", tmp_path / "parts")]
        texts = [path.read_text() if path.exists() else None for path in files]
        headers = (texts[0] or "").partition("\n")[0].split(",")
        times = [header.startswith(("time", "memory")) or "seconds" in header for header in headers]
        rows = [[line.split(",") for line in (each or "").splitlines()] for each in texts]
        kept = [[[cell for cell, time in zip(row, times, strict=True) if not time] for row in each] for each in rows]
        assert kept[0] == kept[1]
    assert not (tmp_path / "parts" / "state").exists(), "a finished run needs none"


@pytest.mark.parametrize(
    ("name", "commits"),
    [(name, 3) for name in CASES]
    + [pytest.param(name, 2, marks=pytest.mark.slow) for name in CASES | SLOW_CASES]
    + [pytest.param(name, 3, marks=pytest.mark.slow) for name in SLOW_CASES],
)
def test_resumed_equals_uninterrupted(tmp_path, tiny_llama_folder, text, name, commits):
    options = [f"calibration.path={text}", f"evaluation.text_path={text}", *(CASES | SLOW_CASES)[name]]
    check_resumed(tmp_path, compose_run(tiny_llama_folder, options), commits)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gemma3_text", "gpt2", "opt", "bloom", "phi3"])
def test_resumed_equals_uninterrupted_in_every_kind_of_block(tmp_path, tiny_llama_folder, text, family):
    """Experts, norms by 1 + weight, transposed weights, biases, alibi, fused projections."""
    tiny_model(family).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_llama_folder).save_pretrained(tmp_path / "model")
    options = [f"calibration.path={text}", f"evaluation.text_path={text}", "quant=w4a4", "preprocess=cfp"]
    check_resumed(tmp_path, compose_run(tmp_path / "model", options), 3)


@pytest.mark.parametrize("failing", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3))])
def test_one_write_that_fails_is_made_up_for(tmp_path, tiny_llama_folder, text, failing):
    """A disk that was full for a while: the next state holds what the failed one did not."""
    options = [f"calibration.path={text}", f"evaluation.text_path={text}", "method=gptq", "quant=w4a4"]
    config = compose_run(tiny_llama_folder, options)
    whole = run(tmp_path / "whole", config)
    left = run(tmp_path / "parts", config, commits=failing + 1, failing=failing)
    assert left["status"] == "running"
    resumed = run(tmp_path / "parts", config)
    found = figures(whole, resumed) + weights(tmp_path / "whole" / "checkpoint", tmp_path / "parts" / "checkpoint")
    assert [figure for figure in found if not figure.same] == []
    assert f"going on after window {failing}" in (tmp_path / "parts" / "run.log").read_text()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tiny_llama_folder, text) -> tuple[Path, list[str]]:
    """A run of no learning that stopped after its second window, and what it was started with."""
    options = [f"calibration.path={text}", f"evaluation.text_path={text}", "method=rtn", "quant=w2a16"]
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    run(folder, compose_run(tiny_llama_folder, options), 3)
    return folder, options


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_model_is_refused_and_the_state_stays(tmp_path, tiny_llama_folder, interrupted):
    other = tmp_path / "model"
    other.mkdir()
    for path in tiny_llama_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    here = tmp_path / "run"
    config = compose_run(other, interrupted[1])
    run(here, config, 3)
    weights_file = other / "model.safetensors"
    tensors = load_file(weights_file)
    tensors["model.norm.weight"][0] += 1
    generations.save_file(tensors, weights_file, {"format": "pt"})
    before = snapshot(here)
    with pytest.raises(InputError, match=r"cannot go on, because the result would be another: model was \w+, is \w+"):
        run(here, config)
    after = snapshot(here)
    assert before == after


@pytest.mark.parametrize("key", ["torch", "cbq", "transformers", "lightning"])
def test_another_version_is_refused(tmp_path, tiny_llama_folder, interrupted, monkeypatch, key):
    folder, options = interrupted
    config = compose_run(tiny_llama_folder, options)
    before = snapshot(folder)
    monkeypatch.setattr(
        "cbq.runner.versions", lambda: {"torch": "1", "cbq": "1", "transformers": "1", "lightning": "1"}
    )
    with pytest.raises(InputError, match=rf"{key} was [\w.+]+, is 1"):
        run(folder, config)
    assert snapshot(folder) == before


def test_another_configuration_is_refused_with_what_differs(tiny_llama_folder, interrupted):
    folder, options = interrupted
    config = compose_run(tiny_llama_folder, [*options, "seed=3", "quant.group_size=32"])
    with pytest.raises(InputError, match=r"quant\.group_size was -1, is 32; seed was 0, is 3"):
        RunFolder(folder, config).is_finished()


def test_overwrite_starts_anew(tmp_path, tiny_llama_folder, interrupted, capsys):
    folder, options = interrupted
    here = tmp_path / "run"
    for name, content in snapshot(folder).items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content)
    results = run(here, compose_run(tiny_llama_folder, options), overwrite=True)
    assert results["status"] == "finished"
    assert "going on" not in capsys.readouterr().out


def test_a_state_that_cannot_be_written_is_said_and_the_run_ends_well(
    tmp_path, tiny_llama_folder, interrupted, monkeypatch, capsys
):
    def full(*args: object) -> None:
        raise FULL

    monkeypatch.setattr(generations, "write_tensors", full)
    results = run(tmp_path / "run", compose_run(tiny_llama_folder, interrupted[1]))
    assert results["status"] == "finished"
    assert capsys.readouterr().out.count("the state was not written (No space left on device)") == 5


def test_interrupted_while_it_exports(tmp_path, tiny_llama_folder, interrupted, monkeypatch):
    """It is not finished, and goes on to the export; one whose export fails is finished."""
    config = compose_run(tiny_llama_folder, interrupted[1])

    def failing(error: BaseException):
        def publish(*args: object) -> None:
            raise error

        return publish

    here = tmp_path / "run"
    for error in (KeyboardInterrupt(), ZeroDivisionError()):
        with monkeypatch.context() as patch:
            patch.setattr("cbq.exporter.NoExport.publish", failing(error))
            with pytest.raises(type(error)):
                run(here, config)
        finished = isinstance(error, Exception)
        results = json.loads((here / "results.json").read_text())
        assert results["status"] == ("finished" if finished else "failed")
        assert results.get("export_error", "").startswith("ZeroDivisionError") == finished
        assert (here / "state").exists() != finished
    assert "going on after window 4" in (here / "run.log").read_text()


def test_interrupted_while_curves_are_closed(tmp_path, tiny_llama_folder, interrupted, monkeypatch):
    config = compose_run(tiny_llama_folder, interrupted[1])

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cbq.tracking.Tracker.finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "failed"
    assert run(tmp_path / "run", config)["status"] == "finished"


def test_a_finished_run_that_left_its_state(tmp_path, tiny_llama_folder, interrupted, capsys):
    config = compose_run(tiny_llama_folder, interrupted[1])
    run(tmp_path, config)
    (tmp_path / "state" / "scores").mkdir(parents=True)
    folder = RunFolder(tmp_path, config)
    assert was_finished(folder)
    assert "already finished" in capsys.readouterr().out
    assert not folder.state_path.exists()


@pytest.mark.parametrize(
    "facts",
    [{}, {"identity": 3}, {"identity": "IT", "windows": []}, {"identity": "IT", "parts": [], "windows": []}],
    ids=repr,
)
def test_facts_that_are_none_are_one_line(tmp_path, tiny_llama_folder, interrupted, facts):
    config = compose_run(tiny_llama_folder, interrupted[1])
    run(tmp_path / "run", config, 2)
    store = generations.Generations(tmp_path / "run" / "state")
    known = store.find().facts
    facts = {key: known["identity"] if value == "IT" else value for key, value in facts.items()}
    store.commit({}, facts)
    with pytest.raises(InputError, match="the state to go on from is damaged"):
        run(tmp_path / "run", config)


def test_curves_that_cannot_be_read_do_not_bar_a_run(tmp_path, tiny_llama_folder, interrupted):
    config = compose_run(tiny_llama_folder, interrupted[1])
    run(tmp_path / "run", config, 3)
    (tmp_path / "run" / "metrics.csv").write_bytes(b"\xff\x00nonsense\n1\n")
    assert run(tmp_path / "run", config)["status"] == "finished"


def test_without_state(tmp_path, tiny_llama_folder, interrupted):
    run(tmp_path / "run", compose_run(tiny_llama_folder, [*interrupted[1], "save_state=false"]))
    assert not (tmp_path / "run" / "state").exists()


def test_a_failed_run_leaves_a_report_and_goes_on(tmp_path, tiny_llama_folder, interrupted, monkeypatch, capsys):
    config = compose_run(tiny_llama_folder, interrupted[1])

    def broken(*args: object) -> None:
        raise ZeroDivisionError("somewhere deep")

    with monkeypatch.context() as patch:
        patch.setattr("cbq.runner.save_checkpoint", broken)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", config)
    report = (tmp_path / "run" / "error.txt").read_text()
    for part in ("ZeroDivisionError: somewhere deep", "after window 4", "Traceback", "in broken", "weight_bits: 2"):
        assert part in report
    log = (tmp_path / "run" / "run.log").read_text()
    assert "window 4/4" in log
    assert run(tmp_path / "run", config)["status"] == "finished"
    assert "going on after window 4" in capsys.readouterr().out
    assert not (tmp_path / "run" / "error.txt").exists()


def test_random_states_come_back():
    tensors, facts = random_states()
    facts = json.loads(json.dumps(facts))
    drawn = [torch.rand(3), random.random(), np.random.rand(3), np.random.randn(1)]
    set_random_states(tensors, facts)
    again = [torch.rand(3), random.random(), np.random.rand(3), np.random.randn(1)]
    assert torch.equal(drawn[0], again[0])
    assert drawn[1] == again[1]
    assert (drawn[2] == again[2]).all()
    assert (drawn[3] == again[3]).all()
