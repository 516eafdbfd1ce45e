"""The rows as a Markdown table, for the terminal and for `docs/performance.md`."""

from benchmarks.compare import verdict
from benchmarks.rows import Row

COLUMNS = ("part", "what", "case", "value", "range", "expected", "note")


def format_number(value: float, unit: str) -> str:
    """Write a number as its unit asks for.

    Example:
        >>> format_number(0.1234, "share"), format_number(1.2345, "ratio"), format_number(3.21, "minutes")
        ('12.3 %', '1.23', '3.21 min')
    """
    if unit == "share":
        return f"{value:.1%}".replace("%", " %")
    return f"{value:.2f} min" if unit == "minutes" else f"{value:.2f}"


def cells(row: Row) -> list[str]:
    """Return a row's cells, one a column."""
    span = f"{format_number(row.low, row.unit)} - {format_number(row.high, row.unit)}"
    expected = "" if row.expected is None else format_number(row.expected, row.unit)
    value = format_number(row.value, row.unit)
    return [row.part, row.name, row.case, value, span if len(row.samples) > 1 else "", expected, row.note]


def render(rows: list[Row], baseline: list[Row] | None = None) -> str:
    """Return the table; beside a baseline with its value and what became of it."""
    header, lines = list(COLUMNS), [cells(row) for row in rows]
    if baseline is not None:
        before = {row.key: row for row in baseline}
        header[4:4] = ["baseline", "change"]
        for line, row in zip(lines, rows, strict=True):
            then = before.get(row.key)
            word = verdict(row, then)
            was = "" if then is None else format_number(then.value, then.unit)
            line[4:4] = [was, f"**{word}**" if word == "worse" else word]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in [header, *lines]]
    rule = "|".join("-" * (width + 2) for width in widths)
    head, *body = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([head, f"|{rule}|", *body])
