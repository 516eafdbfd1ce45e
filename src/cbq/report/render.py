"""A sweep's table as Markdown, LaTeX and for a page: the best of a column and scheme in bold."""

import re
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import quote

import pandas as pd
from markupsafe import Markup, escape

from cbq.report.columns import SECONDS
from cbq.report.paper import FULL_PRECISION
from cbq.report.sweep import SweepTable


def grid(
    table: SweepTable, bold: Callable[[str], str], escape: Callable[[str], str]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows as text; a column that the paper has too is followed by the paper's.

    Args:
        table: what to show.
        bold: marks text that is escaped.
        escape: makes any text literal.
    """
    headings = [*table.labels]
    for column in table.columns:
        headings += [" ".join(column), *([f"{' '.join(column)}, paper"] if column in table.paper else [])]
    best = {column: table.best(column) for column in table.columns}
    rows = []
    if table.full_precision:
        labels = [FULL_PRECISION.replace("_", " "), *[""] * (len(table.labels) - 1)] if table.labels else []
        cells = [*map(escape, labels)]
        for column in table.columns:
            value = table.full_precision.get(column)
            cells += [escape(value.format()) if value else "", *paper_cell(table, (FULL_PRECISION,), column)]
        rows.append(cells)
    for row, values in table.rows.items():
        cells = [*map(escape, table.names(row))]
        for column in table.columns:
            text = escape(values[column].format(digits(column)))
            cells += [bold(text) if row in best[column] else text, *paper_cell(table, row, column)]
        rows.append(cells)
    return list(map(escape, headings)), rows


def paper_cell(table: SweepTable, row: tuple[str, ...], column: tuple[str, str]) -> list[str]:
    """Return the paper's cell beside one of ours: none where the column has no figure of the paper's."""
    if column not in table.paper:
        return []
    figure = table.paper[column].get(row)
    return ["" if figure is None else f"{figure:.{digits(column)}f}"]


def digits(column: tuple[str, str]) -> int:
    """Return how many digits after the point a column's numbers have."""
    return 0 if column[1] == SECONDS else 2


def markdown(table: SweepTable, notes: Sequence[str] = ()) -> str:
    """Return a table of GitHub's Markdown, and a paragraph a note below it."""
    headings, rows = grid(table, lambda text: f"**{text}**", lambda text: text.replace("|", "\\|"))
    lines = [headings, ["---"] * len(headings), *rows]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return text + "".join(f"\n{escape_markdown(note)}\n" for note in notes)


def escape_markdown(text: str) -> str:
    r"""Return text that Markdown shows as it is; an underscore inside a word is one already.

    Example:
        >>> print(escape_markdown("W2A16*: dense_ste"))
        W2A16\*: dense_ste
    """
    return re.sub(r"[\\*`<]|\b_|_\b", r"\\\g<0>", text)


def latex(table: SweepTable, notes: Sequence[str] = ()) -> str:
    """Return a `tabular` for the package booktabs, and a paragraph a note below it."""
    headings, rows = grid(table, lambda text: rf"\textbf{{{text}}}", escape_latex)
    style = pd.DataFrame(rows, columns=pd.Index(headings)).style.hide(axis="index")
    text = style.to_latex(
        hrules=True, column_format="l" * len(table.labels) + "r" * (len(headings) - len(table.labels))
    )
    return text + "".join(f"\n{{\\footnotesize {escape_latex(note)}\\par}}\n" for note in notes)


def escape_latex(text: str) -> str:
    r"""Return text that LaTeX prints as it is.

    Example:
        >>> print(escape_latex("table3c_w2 50%"))
        table3c\_w2 50\%
    """
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def html_cells(table: SweepTable) -> pd.DataFrame:
    """Return the table for a page, its cells escaped, with links to the pages of the runs that have one."""
    headings, rows = grid(table, lambda text: Markup("<b>{}</b>").format(text), escape)
    links = {row: links_of(by_model) for row, by_model in table.pages.items()}
    if any(links.values()):
        headings.append("page of seed")
        first = [""] * (len(rows) - len(table.rows))  # full precision
        for cells, link in zip(rows, [*first, *(links.get(row, "") for row in table.rows)], strict=True):
            cells.append(link)
    return pd.DataFrame(rows, columns=pd.Index(headings), dtype=object)


def links_of(by_model: Mapping[str, Sequence[tuple[str, str]]]) -> Markup:
    """Return a row's links to pages, a line a model, which is named where there are several.

    Example:
        >>> print(links_of({"pico": [("0", "a=1,seed=0/report.html")]}))
        <a href="a%3D1%2Cseed%3D0/report.html">0</a>
    """
    lines = []
    for model, pages in by_model.items():
        links = [Markup('<a href="{}">{}</a>').format(quote(path), seed) for seed, path in pages]
        if links:
            lines.append(escape(f"{model} " if len(by_model) > 1 else "") + Markup("&ensp;").join(links))
    return Markup("<br>").join(lines)
