"""One self-contained HTML page: text, tables and charts, light and dark, for a phone and for paper.

Charts are Vega-Altair's specifications; Vega itself stands in the page, which asks no network for anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import altair as alt
import jinja2
import pandas as pd
import vl_convert

TEMPLATE = Path(__file__).with_name("page.html.jinja")
PAPER_SIZE = {"width": 640, "height": 320}  # of the files, in points
RESOLUTION = 2  # of PNG files
# What the page needs of the bundle: embed a chart, and nothing more.
SNIPPET = "window.cbqEmbed = vegaEmbed;"


@dataclass(frozen=True)
class Figure:
    """A chart with its caption.

    Args:
        name: of its files, and of its place in the page.
        caption: says what is seen.
        chart: None: there is nothing to draw, and the figure is left out.
    """

    name: str
    caption: str
    chart: alt.Chart | alt.LayerChart | None


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: its heading.
        intro: a sentence below it.
        tables: of texts and numbers; the first column is what a row is about. Those with very many rows are folded.
        figures: in order.
        texts: title -> text as it is.
        notes: sentences below the tables.
        code: to be copied.
    """

    title: str
    intro: str = ""
    tables: Sequence[pd.DataFrame] = ()
    figures: Sequence[Figure] = ()
    texts: dict[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    code: str = ""

    @property
    def drawn(self) -> list[Figure]:
        """The figures that have a chart."""
        return [figure for figure in self.figures if figure.chart is not None]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.tables or self.drawn or self.texts or self.notes or self.code)


@cache
def bundle() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    return vl_convert.javascript_bundle(SNIPPET)


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the page.

    Args:
        title: its heading.
        subtitle: a line below it.
        sections: in order; empty ones are left out.
    """
    sections = [section for section in sections if not section.is_empty]
    figures = {figure.name: specification(figure) for section in sections for figure in section.drawn}
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, subtitle=subtitle, sections=sections, specifications=figures, bundle=bundle() if figures else ""
    )


def specification(figure: Figure) -> dict:
    """Return a figure's chart as Vega-Lite, as wide as the page lets it be."""
    chart = figure.chart.properties(width="container", autosize=alt.AutoSizeParams(type="fit-x", contains="padding"))
    return chart.to_dict()


def write_figures(folder: Path, sections: Sequence[Section]) -> None:
    """Write every figure as PNG and SVG, for papers.

    Args:
        folder: made when missing.
        sections: of a page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for figure in (figure for section in sections for figure in section.drawn):
        size = PAPER_SIZE if figure.chart.to_dict().get("height") is None else {"width": PAPER_SIZE["width"]}
        write_chart(figure.chart.properties(**size), folder / figure.name)


def write_chart(chart: alt.TopLevelMixin, path: Path) -> None:
    """Write a chart as PNG and SVG, on white.

    Args:
        chart: with its size.
        path: without the names' ends.
    """
    svg = vl_convert.vegalite_to_svg(chart.properties(background="white").to_json(indent=None))
    path.with_name(f"{path.name}.svg").write_text(svg, encoding="utf-8")
    path.with_name(f"{path.name}.png").write_bytes(vl_convert.svg_to_png(svg, scale=RESOLUTION))
