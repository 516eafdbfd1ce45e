"""A run's charts of one chosen place of the model, a block and a module in it: its outliers, its weights."""

from collections.abc import Callable, Mapping, Sequence

import altair as alt

from cbq.report.charts import BLUE, GREY, RED, Chart, chosen_in, menu, state_color

MAX_POINTS = 100_000  # of a chart: of large models every few blocks
BEFORE, AFTER = "before", "after"
IS_CHOSEN = "datum.block == chosen_block && datum.name == chosen_name"
TITLE_OF_PLACE = chosen_in("'block ' + chosen_block + ', ' + chosen_name")


def outliers(found: Sequence[Mapping], by: str) -> Chart | None:
    """Return the channels of a chosen place before and after preprocessing, with the thresholds of Algorithm 1.

    Args:
        found: a part of `outliers.json`.
        by: the label of the y axis.

    Source: Figure 3.
    """
    if not found:
        return None
    found = thinned(found, lambda each: len(each["channels"]), MAX_POINTS)
    loudest = max(found, key=lambda each: max(each["before"]) / (each["threshold"] or 1e-9))
    chosen = menus_of_places([(each["block"], each["name"]) for each in found], (loudest["block"], loudest["name"]))
    places = alt.Chart(alt.InlineData(values=list(found))).transform_filter(IS_CHOSEN)
    points = (
        places.transform_flatten(["channels", BEFORE, AFTER], as_=["channel", BEFORE, AFTER])
        .transform_fold([BEFORE, AFTER], as_=["state", "value"])
        .encode(
            x=alt.X("channel:Q", title="channel", scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=by),
            color=state_color([BEFORE, AFTER]),
            tooltip=["channel:Q", "state:N", alt.Tooltip("value:Q", format=".4g")],
        )
    )
    # Rings around dots: both are seen where preprocessing changed nothing.
    rings = points.transform_filter(f"datum.state == '{BEFORE}'").mark_point(size=70, strokeWidth=1.5)
    dots = points.transform_filter(f"datum.state == '{AFTER}'").mark_circle(size=20, opacity=1)
    lines = (
        places.transform_calculate(coarse="datum.coarse_threshold", fine="datum.threshold")
        .transform_fold(["coarse", "fine"], as_=["which", "value"])
        .mark_rule(strokeWidth=1.5, color=GREY)
        .encode(
            y="value:Q",
            strokeDash=alt.StrokeDash("which:N", title="threshold", legend=alt.Legend(orient="top")),
            tooltip=[alt.Tooltip("which:N", title="threshold"), alt.Tooltip("value:Q", format=".4g")],
        )
    )
    return alt.layer(rings, dots, lines, title=TITLE_OF_PLACE).add_params(*chosen)


def weights(blocks: Sequence[Mapping]) -> Chart | None:
    """Return how a chosen linear's weights lie on the integer grid, and how often each integer is taken.

    Args:
        blocks: the contents of `weights/block_*.json`.
    """
    rows = [
        {
            "block": block["block"],
            "name": name,
            "low": found["low"],
            "step": (found["high"] - found["low"]) / len(found["weights"]),
            "weights": per_million(found["weights"]),
            "integers": per_million(found["integers"]),
        }
        for block in blocks
        for name, found in block["linears"].items()
    ]
    if not rows:
        return None
    rows = thinned(rows, lambda row: len(row["weights"]) + len(row["integers"]), MAX_POINTS)
    places = alt.Chart(alt.InlineData(values=rows)).transform_filter(IS_CHOSEN)
    histogram = (
        places.transform_calculate(position="sequence(length(datum.weights))")
        .transform_flatten(["weights", "position"], as_=["count", "position"])
        .transform_calculate(
            from_="datum.low + datum.step * datum.position",
            to="datum.low + datum.step * (datum.position + 1)",
            density="datum.count / 1e6 / datum.step",
        )
        .mark_bar(color=BLUE, opacity=0.6, binSpacing=0)
        .encode(
            x=alt.X(
                "from_:Q", title="weight / scale + zero point: integers are the grid", axis=alt.Axis(tickMinStep=1)
            ),
            x2="to:Q",
            y=alt.Y("density:Q", title="share of weights, a step of the grid"),
            y2=alt.datum(0),
            tooltip=[
                alt.Tooltip("from_:Q", title="from", format=".2f"),
                alt.Tooltip("density:Q", title="share a step", format=".2%"),
            ],
        )
    )
    grid = (
        places.transform_calculate(integer="sequence(length(datum.integers))")
        .transform_flatten(["integers", "integer"], as_=["count", "integer"])
        .transform_filter("datum.count > 0")
        .transform_calculate(share="datum.count / 1e6")
    )
    stems = grid.mark_rule(color=RED, strokeWidth=2).encode(x="integer:Q", y="share:Q", y2=alt.datum(0))
    heads = grid.mark_circle(color=RED, size=45, opacity=1).encode(
        x="integer:Q",
        y="share:Q",
        tooltip=["integer:Q", alt.Tooltip("share:Q", title="share of weights that take it", format=".2%")],
    )
    chosen = menus_of_places([(row["block"], row["name"]) for row in rows])
    return alt.layer(histogram, stems, heads, title=TITLE_OF_PLACE).add_params(*chosen)


def per_million(counts: Sequence[int]) -> list[int]:
    """Return shares of the sum, in millionths: few digits, however large a matrix is.

    Example:
        >>> per_million([1, 3])
        [250000, 750000]
    """
    total = sum(counts) or 1
    return [round(1e6 * count / total) for count in counts]


def thinned(places: Sequence[Mapping], size: Callable[[Mapping], int], limit: int) -> list[Mapping]:
    """Return the places of every k-th block, so that their sizes come to about the limit at most.

    Example:
        >>> thinned([{"block": 0}, {"block": 1}, {"block": 2}], size=lambda place: 1, limit=2)
        [{'block': 0}, {'block': 2}]
    """
    every = max(1, -(-sum(map(size, places)) // limit))
    return [place for place in places if place["block"] % every == 0]


def menus_of_places(
    places: Sequence[tuple[int, str]], first: tuple[int, str] | None = None
) -> tuple[alt.Parameter, alt.Parameter]:
    """Return menus of a block and of a module in it.

    Args:
        places: block and name of each.
        first: what is chosen at first; None: the first.
    """
    found = zip(("chosen_block", "chosen_name"), ("block", "module"), zip(*places, strict=True), strict=True)
    first = first or places[0]
    return tuple(
        menu(name, label, list(dict.fromkeys(options)), chosen)
        for (name, label, options), chosen in zip(found, first, strict=True)
    )
