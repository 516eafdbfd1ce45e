"""`cbq report`, from runs on disk to files."""

import re
import sys

import pytest

from cbq.cli import main
from cbq.results import write_results


@pytest.fixture
def cbq(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cbq", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


def test_files_and_a_table(cbq, result, tmp_path, monkeypatch):
    """In a folder whose name needs quoting, from another working folder, which stays empty."""
    folder, elsewhere = tmp_path / "it's, a=sweep", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name, value in (("table15_cfp", 16.5), ("table15_cbd", 16.25)):
        write_results(folder / name, result(value, experiment=name, rounding="dense_ste"))
    (folder / "table15_cfp").rename(folder / "table15_cfp=1")
    (folder / "table15_cfp=1" / "report.html").write_text("the page of a run")
    for words in (["report", str(folder)], ["report", str(folder)]):  # again: the same
        code, output, error = cbq(*words)
        assert (code, error) == (0, "")
        assert "| cbd | **16.25** |" in output
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "report.md",
        "report.html",
        "report.tex",
        "report.png",
        "report.svg",
    }
    assert "| cfp | 16.50 |" in (folder / "report.md").read_text()
    assert "Commit abc" in (folder / "report.html").read_text()
    page = (folder / "report.html").read_text()
    assert len(page) < 3_000_000
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    links = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', markup)
    assert links == ["table15_cfp%3D1/report.html"], "nothing is fetched"
    for name, said in (("md", "dense_ste"), ("html", "dense_ste"), ("tex", r"dense\_ste")):
        assert f"In all rows: rounding={said}." in (folder / f"report.{name}").read_text()
    assert not list(elsewhere.iterdir())


def test_cells_of_the_table_that_have_no_run(cbq, result, tmp_path):
    write_results(tmp_path / "one", result(experiment="table12_rank5"))
    code, output, _ = cbq("report", str(tmp_path))
    assert code == 0
    assert output.count("missing | missing | missing") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "folder is required"),
        (["report", "/no/folder"], "/no/folder is no folder"),
        (["report", "."], "no run below"),
        (["report", "folder=."], "no run below"),
        (["report", ".", "foldr=x"], "foldr"),
    ],
)
def test_a_mistake_is_one_line(cbq, tmp_path, monkeypatch, words, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, output, error = cbq(*words)
    assert (code, output) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / "empty").is_dir()
