"""Perplexity against what it costs: the rows of a sweep's table as points, and those that nothing beats as a line."""

from collections.abc import Sequence
from pathlib import Path

import altair as alt

from cbq.report.charts import menu
from cbq.report.columns import SECONDS
from cbq.report.sweep import SweepTable

LOGARITHMIC = 3  # from this ratio of the largest value to the smallest on


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


def plot(table: SweepTable, path: Path) -> bool:
    """Draw perplexity over seconds of reconstruction, a panel a model and corpus.

    Args:
        table: what to show.
        path: of a PNG file.

    Returns:
        whether there was something to draw.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    panels = {}
    for model, corpus in [column for column in table.columns if column[1] in table.corpora]:
        points = {row: (values[model, SECONDS].mean, values[model, corpus].mean) for row, values in table.rows.items()}
        points = {row: point for row, point in points.items() if None not in point}
        if points:
            panels[model, corpus] = points
    if not panels:
        return False
    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, ((model, corpus), points) in zip(axes[0], panels.items(), strict=True):
        seconds, perplexities = zip(*points.values(), strict=True)
        axis.plot(*zip(*front(list(points.values())), strict=True), color="tab:orange", zorder=1)
        axis.scatter(seconds, perplexities, zorder=2)
        for row, point in points.items():
            axis.annotate(" ".join(table.names(row)), point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set(xlabel="seconds of reconstruction", ylabel=f"perplexity on {corpus}", title=model)
        for dimension, set_scale, values in (
            (axis.xaxis, axis.set_xscale, seconds),
            (axis.yaxis, axis.set_yscale, perplexities),
        ):
            if min(values) > 0 and max(values) > LOGARITHMIC * min(values):
                set_scale("log")
                dimension.set_major_formatter(ticker.LogFormatter())
                dimension.set_minor_formatter(ticker.LogFormatter())
        axis.margins(0.2)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def pareto_chart(table: SweepTable) -> alt.Chart | None:
    """Return perplexity over seconds of reconstruction for a chosen model and corpus."""
    rows = [
        {
            "what": " ".join(column),
            "row": " ".join(table.names(row)),
            "scheme": table.schemes.get(row, ""),
            "seconds": seconds,
            "perplexity": perplexity,
        }
        for column in table.columns
        if column[1] in table.corpora
        for row, values in table.rows.items()
        if (seconds := values[column[0], SECONDS].mean) and (perplexity := values[column].mean)
    ]
    if not rows:
        return None
    scale = alt.Scale(type="log", nice=False, padding=20)
    return (
        alt.Chart(alt.InlineData(values=rows))
        .transform_filter("datum.what == shown")
        .mark_circle(size=90, opacity=0.85)
        .encode(
            x=alt.X("seconds:Q", title="seconds of reconstruction", scale=scale, axis=alt.Axis(format=".3~s")),
            y=alt.Y("perplexity:Q", scale=scale, axis=alt.Axis(format=".4~g")),
            color=alt.Color("scheme:N", legend=alt.Legend(orient="top")),
            tooltip=["row:N", alt.Tooltip("perplexity:Q", format=".4g"), alt.Tooltip("seconds:Q", format=".0f")],
        )
        .add_params(menu("shown", "of", list(dict.fromkeys(row["what"] for row in rows))))
    )
