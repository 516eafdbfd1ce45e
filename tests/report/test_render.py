"""The three forms of a table say the same."""

import pytest

from cbq.report.page import Section, render
from cbq.report.render import html_cells, latex, markdown
from cbq.report.sweep import SweepTable, sweep_table


@pytest.fixture
def table(result) -> SweepTable:
    runs = [result(experiment="table1_a&b_50%", quantized=17.25), result(experiment="table1_|c|", quantized=16.5)]
    return sweep_table(runs, expected=["table1_<d>"])


def test_markdown(table):
    lines = markdown(table).splitlines()
    assert lines[0] == "| experiment | pico embedded | pico seconds | pico GiB |"
    assert lines[2] == "| full precision | 15.00 |  |  |"
    assert lines[3] == "| a&b_50% | 17.25 | 1725 | **1.00** |"
    assert lines[4] == r"| \|c\| | **16.50** | **1650** | **1.00** |"
    assert lines[5] == "| <d> | missing | missing | missing |"


def test_latex(table):
    text = latex(table)
    assert r"a\&b\_50\% & 17.25 & 1725 & \textbf{1.00} \\" in text
    assert r"\textbf{16.50}" in text
    assert text.startswith(r"\begin{tabular}{lrrr}")
    assert text.count(r"\\") == 5


def test_notes_are_below_the_table_and_literal(table):
    note = "W2A16*: rounding=dense_ste quant.overrides=['.*fc', '.*']"
    assert markdown(table, [note]).endswith("|\n\nW2A16\\*: rounding=dense_ste quant.overrides=['.\\*fc', '.\\*']\n")
    assert latex(table, [note, "50%"]).partition(r"\end{tabular}")[2].splitlines() == [
        "",
        "",
        r"{\footnotesize W2A16*: rounding=dense\_ste quant.overrides=['.*fc', '.*']\par}",
        "",
        r"{\footnotesize 50\%\par}",
    ]


def test_cells_of_a_page(table):
    text = render("a <title>", "2 rows", [Section("Table", tables=[html_cells(table)], notes=["note & more"])])
    assert "<h1>a &lt;title&gt;</h1>" in text
    assert "<td>a&amp;b_50%</td>" in text
    assert "<td><b>16.50</b></td>" in text
    assert "&lt;d&gt;" in text
    assert text.count("<tr") == 5
    assert "note &amp; more" in text
    assert "http" not in text
    assert "<script" not in text, "nothing to draw"
