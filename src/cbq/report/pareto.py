"""Perplexity against what it costs: the rows of a sweep's table as points, and those that nothing beats as a line."""

from collections.abc import Sequence

import altair as alt

from cbq.report.charts import menu
from cbq.report.columns import SECONDS
from cbq.report.sweep import SweepTable

PANEL = {"width": 460, "height": 340}  # points
ORANGE = "#e08214"


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other is as good as in both coordinates, smaller being better, by the first.

    Example:
        >>> front([(1.0, 5.0), (2.0, 3.0), (3.0, 4.0)])
        [(1.0, 5.0), (2.0, 3.0)]
    """
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def points(table: SweepTable) -> list[dict]:
    """Return every row's perplexities and seconds, and whether nothing beats them."""
    found = []
    for column in [column for column in table.columns if column[1] in table.corpora]:
        means = {row: (values[column[0], SECONDS].mean, values[column].mean) for row, values in table.rows.items()}
        known = {row: point for row, point in means.items() if all(point)}  # no logarithm of 0 seconds
        best = front(list(known.values()))
        found += [
            {
                "what": " ".join(column),
                "row": " ".join(table.names(row)),
                "scheme": table.schemes.get(row, ""),
                "seconds": point[0],
                "perplexity": point[1],
                "front": point in best,
            }
            for row, point in known.items()
        ]
    return found


def axes() -> dict[str, alt.X | alt.Y]:
    """Return the axes: a ratio is a length."""
    scale = alt.Scale(type="log", nice=False, padding=20)
    return {
        "x": alt.X("seconds:Q", title="seconds of reconstruction", scale=scale, axis=alt.Axis(format=".3~s")),
        "y": alt.Y("perplexity:Q", scale=scale, axis=alt.Axis(format=".4~g")),
    }


def panels(table: SweepTable) -> alt.FacetChart | None:
    """Return perplexity over seconds of reconstruction for files: a panel a model and corpus, a name a point."""
    rows = points(table)
    if not rows:
        return None
    base = alt.Chart().encode(**axes())
    line = base.transform_filter("datum.front").mark_line(color=ORANGE, strokeWidth=1.5)
    dots = base.mark_circle(size=60, opacity=1).encode(color=alt.Color("scheme:N", legend=alt.Legend(orient="top")))
    names = base.mark_text(align="left", dx=6, dy=-5, fontSize=11).encode(text="row:N")
    layers = alt.layer(line, dots, names, data=alt.InlineData(values=rows)).properties(**PANEL)
    header = alt.Header(title=None, labelFontSize=13)
    return layers.facet(alt.Facet("what:N", header=header, sort=None), columns=2).resolve_scale(
        x="independent", y="independent"
    )


def pareto_chart(table: SweepTable) -> alt.Chart | None:
    """Return perplexity over seconds of reconstruction for a page: of a chosen model and corpus."""
    rows = points(table)
    if not rows:
        return None
    return (
        alt.Chart(alt.InlineData(values=rows))
        .transform_filter("datum.what == shown")
        .mark_circle(size=90, opacity=0.85)
        .encode(
            **axes(),
            color=alt.Color("scheme:N", legend=alt.Legend(orient="top")),
            tooltip=["row:N", alt.Tooltip("perplexity:Q", format=".4g"), alt.Tooltip("seconds:Q", format=".0f")],
        )
        .add_params(menu("shown", "of", list(dict.fromkeys(row["what"] for row in rows))))
    )
