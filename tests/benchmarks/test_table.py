"""The Markdown table."""

from benchmarks.rows import Row
from benchmarks.table import render

ROWS = [
    Row("step", "A / B", "pico", (1.5, 1.25, 2.0), expected=1.5, note="bare 3 ms"),
    Row("run", "share of loading", "pico", (0.25,), "share", judged=False),
]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_a_line():
    head, rule, *body = render(ROWS).splitlines()
    assert cells(head) == ["part", "what", "case", "value", "range", "expected", "note"]
    assert set(rule) == {"|", "-"}
    assert [cells(line) for line in body] == [
        ["step", "A / B", "pico", "1.50", "1.25 - 2.00", "1.50", "bare 3 ms"],
        ["run", "share of loading", "pico", "25.0 %", "", "", ""],
    ]
    assert len({len(line) for line in (head, rule, *body)}) == 1


def test_beside_a_baseline():
    then = [Row("step", "A / B", "pico", (0.5, 0.5, 0.5)), Row("run", "gone", "pico", (1.0,))]
    head, _, *body = render(ROWS, then).splitlines()
    assert cells(head)[3:7] == ["value", "baseline", "change", "range"]
    assert [cells(line)[3:6] for line in body] == [["1.50", "0.50", "**worse**"], ["25.0 %", "", "new"]]
