"""The command: the quick run, its table and files, --compare, and mistakes."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from benchmarks import cli, memory, probe
from benchmarks.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
STEP = ["window step / bare step", "plain loop / bare step", "window step / plain loop"]
KINDS = ["nearest", "lora_ste", "dense_ste", "lora", "lora hard", "adaround", "adaround hard"]
PHASES = [
    *("composing options", "loading", "sample texts", "activation streams", "targets", "window steps", "measuring"),
    *("fusing", "collecting garbage", "saving", "evaluation", "tracking", "other"),
]
EXPECTED_KEYS = {
    *(f"step/{name}/tiny 1x8 {case}" for name in STEP for case in ("W4A4 lora_ste", "W2A16 lora")),
    *(
        f"fusion/fake-quantize {direction}: installed / plain chain/tiny 64x32 W4 {kind}"
        for direction in ("forward", "backward")
        for kind in KINDS
    ),
    "growth/time by blocks/1, 2",
    "memory/peak memory / formula/tiny 3x8 W4A4 lora_ste",
    *(f"memory/kept until the backward / fused/W4 {kind}" for kind in KINDS if "hard" not in kind),
    *(f"run/share of {phase}/pico" for phase in PHASES),
    "run/whole run / its steps in a plain loop/pico",
}


def probe_here(work: memory.Work) -> dict[str, float]:
    """The memory probe in this process; a slow test runs it in its own."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        probe.main(work.to_json())
    return json.loads(printed.getvalue())


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a quick run, and what it printed."""
    folder = tmp_path_factory.mktemp("benchmarks") / "new" / "folder"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(memory, "probe", probe_here)
        code = cli.main(["--quick", "--repeats", "1", "--no-plot", "--output", str(folder)])
    assert code == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_every_row_is_there(quick):
    folder, printed = quick
    rows, environment = read_rows(folder / "benchmarks.json")
    assert {row.key for row in rows} == EXPECTED_KEYS
    assert len(rows) == len(EXPECTED_KEYS)
    assert all(row.value > 0 for row in rows if row.part in ("step", "fusion"))
    shares = [row.value for row in rows if row.unit == "share"]
    assert sum(shares) == pytest.approx(1.0)
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(EXPECTED_KEYS)
    assert f"{environment['threads']} threads" in printed


@pytest.mark.slow
def test_content_of_the_file(quick):
    content = json.loads((quick[0] / "benchmarks.json").read_text())
    assert content["format_version"] == 1
    assert content["command"].startswith("python -m benchmarks --quick")
    assert content["skipped"] == []


@pytest.fixture
def one_row(monkeypatch) -> None:
    """A part that measures nothing: its ratio is 2."""
    row = cli.Row("step", "A / B", "pico", (2.0, 2.0, 2.0))
    skipped = cli.Skipped("step 7b", "needs 40 GiB")
    monkeypatch.setitem(cli.PARTS, "step", lambda plan: iter([row, skipped]))


def test_compare_marks_a_regression(one_row, tmp_path, capsys):
    options = ["--only", "step", "--no-plot", "--output", str(tmp_path)]
    assert cli.main(options) == 0
    assert "skipped: step 7b: needs 40 GiB" in capsys.readouterr().out
    baseline = tmp_path / "baseline.json"
    content = json.loads((tmp_path / "benchmarks.json").read_text())
    baseline.write_text(json.dumps(content))
    assert cli.main([*options, "--compare", str(baseline)]) == 0
    printed = capsys.readouterr().out
    assert "| same " in printed
    assert "by more than the noise: 0" in printed

    content["rows"][0]["samples"] = [1.5, 1.5, 1.5]
    content["rows"].append(content["rows"][0] | {"name": "gone"})
    content["environment"]["threads"] = 99
    baseline.write_text(json.dumps(content))
    assert cli.main([*options, "--compare", str(baseline)]) == 0
    printed = capsys.readouterr().out
    assert "**worse**" in printed
    assert "by more than the noise: 1\n  step/A / B/pico\nin the baseline only: 1\n" in printed
    assert "another machine: threads 99 -> " in printed


def test_plot(one_row, tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["--only", "step", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "pico,2b"], "--sizes takes tiny, pico, 1b, 7b, separated by commas; got '2b'"),
        (["--sizes", ""], "got ''"),
        (["--only", "a"], "--only takes step, fusion, growth, memory, run, separated by commas; got 'a'"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--repeats", "many"], "invalid int value: 'many'"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--compare", "missing.json"], "baseline missing.json cannot be read"),
        (["--output", str(ROOT / "README.md")], "--output"),
    ],
)
def test_a_mistake_is_one_line(options, message, capsys):
    assert cli.main([*options, "--quick"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert streams.err.startswith("benchmarks: ")
    assert message in streams.err


def test_modules_are_short_and_the_package_does_not_know_them():
    modules = list((ROOT / "benchmarks").glob("*.py"))
    assert len(modules) > 10
    assert not [module.name for module in modules if len(module.read_text().splitlines()) > 300]
    package = list((ROOT / "src").rglob("*.py"))
    assert not [module for module in package if "import benchmarks" in module.read_text().replace("from", "import")]
