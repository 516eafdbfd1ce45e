import os
from pathlib import Path

import pytest

from cbq.errors import InputError
from cbq.report.runs import RunList
from cbq.results import write_results


@pytest.fixture
def runs(tmp_path: Path, result) -> Path:
    """Four finished runs, of which the last measured nothing, and a failed one."""
    for number, (name, quantized, seconds) in enumerate(
        [("b", 20.0, 60), ("a", 16.0, 3723), ("c", 18.0, 5), ("d", 0, 1)]
    ):
        found = result(quantized=quantized) | {"method": "cbq", "effective_bits": 4.0}
        found["cost"]["wall_time_seconds"] = seconds
        if name == "d":
            found["perplexity"] = {}
        write_results(tmp_path / "sweep" / name, found)
        os.utime(tmp_path / "sweep" / name / "results.json", (1000 + number, 1000 + number))
    write_results(tmp_path / "broken", result(status="failed"))
    return tmp_path


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("finished", "bacd"),
        ("-finished", "dcab"),
        ("perplexity", "acbd"),
        ("-perplexity", "bcad"),  # nothing measured: last whichever way round
        ("seconds", "dcba"),
        ("folder", "abcd"),
    ],
)
def test_runs_in_order(runs, sort, order):
    assert "".join(Path(run["folder"]).name for run in RunList(str(runs), sort).run()) == order


def test_what_is_shown(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    RunList(str(runs), "perplexity").run()
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.endswith("sweep/a ") or "sweep/a" in line]
    for cell in ("pico", "W4A4", "cbq", "16.00", "15.00", "1:02:03"):
        assert cell in row
    assert lines[-1] == f"4 finished runs below {runs}, 1 unfinished or failed"


def test_a_narrow_terminal_cuts_nothing(tmp_path, result, capsys, monkeypatch):
    """Nor does a pipe, which has no width."""
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / ("a folder with a very long name" * 4)
    found = result(model="meta-llama/Llama-3.1-8B") | {"method": "cbq", "effective_bits": 4.0}
    found["cost"]["wall_time_seconds"] = 60
    write_results(folder, found)
    RunList(str(tmp_path)).run()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if str(folder) in line]
    assert "meta-llama/Llama-3.1-8B" in row


def test_files_of_other_programs_and_failed_runs_are_named(runs, result, capsys):
    for name, text in (
        ("lm_eval", '{"results": {}}'),
        ("half", '{"format_version": 1, "sta'),
        ("a", '{"format_version": 1}'),
    ):
        (runs / name).mkdir()
        (runs / name / "results.json").write_text(text)
    write_results(runs / "late", result(status="failed") | {"error": "OSError: [no] room"})
    assert len(RunList(str(runs)).run()) == 4
    lines = capsys.readouterr().out.splitlines()
    assert f"failed: {runs / 'late'}  OSError: [no] room" in lines
    for name, reason in (("lm_eval", "has format_version None"), ("half", "is not valid JSON"), ("a", "is of no run")):
        assert [line for line in lines if f"{name}/results.json {reason}" in line and line.startswith("not read: ")]
    assert lines[-1] == f"4 finished runs below {runs}, 2 unfinished or failed"


def test_without_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunList().run() == []
    assert capsys.readouterr().out == "0 finished runs below outputs and multirun\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nowhere",), "nowhere is no folder"), ((None, "speed"), "sort must be one of finished, .*, got 'speed'")],
)
def test_mistakes(arguments, message):
    with pytest.raises(InputError, match=message):
        RunList(*arguments)
