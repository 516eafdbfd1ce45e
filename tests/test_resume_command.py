"""`resume=<folder>` and `cbq reproduce`: the command line of a run, typed again."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cbq.cli.options import quote
from cbq.cli.reproduce import Reproduction
from cbq.cli.resume import command_of, resumed
from cbq.errors import InputError
from cbq.report.reproduction import figures

RESULTS = {"format_version": 1, "status": "finished", "overrides": ["quant=w4a4", "seed=1"], "environment": {}}


def leave(folder: Path, **changes: object) -> Path:
    """Leave a run's results."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(RESULTS | {"working_folder": str(folder.parent)} | changes))
    return folder


def test_the_command_line_is_typed_again_where_it_was(tmp_path, monkeypatch):
    folder = leave(tmp_path / "it's a run")
    monkeypatch.chdir("/")
    expected = ["quant=w4a4", "seed=1", f"hydra.run.dir={quote(str(folder))}", "tracking.mode=disabled"]
    assert resumed([f"resume={folder}", "tracking.mode=disabled"]) == expected
    assert Path.cwd() == tmp_path


def test_without_resume_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resumed(["quant=w4a4", "-m"]) == ["quant=w4a4", "-m"]
    assert Path.cwd() == tmp_path


def test_a_relative_folder_begins_where_it_is_typed(tmp_path, monkeypatch):
    leave(tmp_path / "run", working_folder="/")
    monkeypatch.chdir(tmp_path)
    assert resumed(["resume=run"])[2] == f"hydra.run.dir={quote(str(tmp_path / 'run'))}"
    os.chdir(tmp_path)


@pytest.mark.parametrize(
    "words", [["resume="], ["resume=a", "resume=b"], ["resume=a", "-m"], ["resume=a", "--multirun"]]
)
def test_what_resume_is_not(words):
    with pytest.raises(InputError, match="resume must be one run folder"):
        resumed(words)


def test_a_folder_without_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no run of cbq"):
            resumed([f"resume={folder}"])


@pytest.mark.parametrize("overrides", [None, "quant=w4a4", [1], {"a": 1}])
def test_a_run_that_does_not_say_what_was_typed(tmp_path, overrides):
    with pytest.raises(InputError, match="does not say what was typed"):
        command_of(leave(tmp_path / "run", overrides=overrides))


@pytest.mark.parametrize(
    "word",
    [
        *("runner._target_=os.system", "+x._target_=os.system", "hydra.run.dir=/", "+hydra/launcher=x", "-m", "-cd=x"),
        *(
            "x={_target_: torch.load}",
            "++x=[{a: {_target_: b}}]",
            "model.trust_remote_code=true",
            "seed=${oc.env:HOME}",
        ),
    ],
)
def test_a_folder_of_somebody_else_names_no_code(tmp_path, word):
    with pytest.raises(InputError, match="names code or hydra options to run"):
        command_of(leave(tmp_path / "run", overrides=["quant=w4a4", word]))


@pytest.mark.parametrize("place", [None, 3, "relative", ""])
def test_where_it_was_typed_is_no_folder_of_the_sender(tmp_path, place):
    with pytest.raises(InputError, match="does not say where it was typed"):
        command_of(leave(tmp_path / "run", working_folder=place))


def test_a_module_in_the_folder_of_somebody_else_is_not_run(tmp_path):
    """`python -m cbq` would take it for cbq."""
    folder = leave(tmp_path / "run", overrides=["model=none_such"])
    (tmp_path / "cbq").mkdir()
    (tmp_path / "cbq" / "__init__.py").write_text("")
    (tmp_path / "cbq" / "__main__.py").write_text("open('planted', 'w')")
    with pytest.raises(InputError, match="does not run again: it ended with code 2"):
        Reproduction(str(folder)).run()
    assert not (tmp_path / "planted").exists()


def test_a_run_with_an_export_elsewhere_is_reproduced(
    command, tiny_llama_folder, tiny_text_file, tmp_path, monkeypatch
):
    """The copy's export is in its own folder: that of the run is there already, and stays as it is."""
    run, out = tmp_path / "run", tmp_path / "for vllm"
    words = [
        *("model=hf", f"model.path={tiny_llama_folder}", "quant=w4a16", "target=transformers", "reconstruction=none"),
        *("calibration=text", f"calibration.path={tiny_text_file}", "calibration.num_segments=2"),
        *("calibration.segment_tokens=32", "evaluation=none"),
        *("tracking.mode=disabled", "report=none", "export=compressed_tensors", "export.verify=false"),
    ]
    assert command(*words, f"++export.out={quote(str(out))}", f"hydra.run.dir={run}") == 0
    before = {path: path.read_bytes() for path in out.iterdir()}

    def in_this_process(words: list[str], cwd: Path, env: dict, check: bool) -> SimpleNamespace:
        assert words[:3] == [sys.executable, "-m", "cbq"]
        return SimpleNamespace(returncode=command(*words[3:]))

    monkeypatch.setattr("cbq.cli.reproduce.subprocess", SimpleNamespace(run=in_this_process))
    assert Reproduction(str(run)).run() == []
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    copy = run / "reproduced" / "export"
    assert {path.name for path in copy.iterdir()} == {path.name for path in out.iterdir()}


def test_only_what_is_finished_is_reproduced(tmp_path):
    with pytest.raises(InputError, match=r"is running, not finished: cbq resume="):
        Reproduction(str(leave(tmp_path / "run", status="running"))).run()
    with pytest.raises(InputError, match="which is not there"):
        Reproduction(str(leave(tmp_path / "run", working_folder=str(tmp_path / "gone")))).run()
    with pytest.raises(InputError, match="folder must be a folder, got 3"):
        Reproduction(3)


def test_figures_of_two_runs():
    """A time is no figure; one that only one of them has differs."""
    then = {"perplexity": {"c4": {"rtn": 1.5, "quantized": None}}, "windows": [{"start": 0, "wall_time_seconds": 1}]}
    now = {
        "perplexity": {"c4": {"rtn": 1.25, "quantized": None}},
        "windows": [{"start": 0, "wall_time_seconds": 2}, {"start": 1}],
    }
    found = {figure.name: figure.same for figure in figures(then, now)}
    assert found == {
        "perplexity.c4.rtn": False,
        "perplexity.c4.quantized": True,
        "windows.0.start": True,
        "windows.1.start": False,
    }
