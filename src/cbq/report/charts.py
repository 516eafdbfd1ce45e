"""A run's charts, by Vega-Altair: each is one specification, for the page (interactive) and for files (PNG, SVG)."""

from collections.abc import Callable, Mapping, Sequence

import altair as alt
import pandas as pd

MAX_STEPS = 3000  # points of the curves, all windows together
MAX_POINTS = 100_000  # of a chart with a menu of places: of large models every few blocks
# The order of a page's menu; what a run has not is left out.
SHOWN_FIRST = ("loss/rec", "loss/l2", "loss/kld", "loss/com", "loss/total", "beta")
SELDOM = ("rounding/", "drift/")  # looked at once in many steps: points beside the line
BEFORE, AFTER = "before", "after"
NEAREST, LEARNED = "round-to-nearest", "learned"
BLUE, RED, GREY = "#2e86c1", "#d1495b", "#888888"  # seen on light and on dark
Chart = alt.Chart | alt.LayerChart


def inline(frame: pd.DataFrame) -> alt.InlineData:
    """Return a frame as the CSV text that a page carries: a third of what rows in JSON would take."""
    text = frame.to_csv(index=False, float_format="%.5g")
    return alt.InlineData(values=text, format=alt.CsvDataFormat(type="csv"))


def menu(name: str, label: str, options: Sequence[str | int], first: str | int | None = None) -> alt.Parameter:
    """Return a parameter that a menu on the page sets; it starts at `first`, or at the first option."""
    value = options[0] if first is None else first
    return alt.param(name=name, value=value, bind=alt.binding_select(options=list(options), name=f"{label} "))


def chosen_in(expression: str) -> alt.Title:
    """Return a title that says what is chosen in the menus: files have none."""
    return alt.Title(alt.ExprRef(expression), anchor="start", fontSize=12, fontWeight="normal")


IS_CHOSEN = "datum.block == chosen_block && datum.name == chosen_name"
TITLE_OF_PLACE = chosen_in("'block ' + chosen_block + ', ' + chosen_name")


def curves(steps: pd.DataFrame) -> Chart | None:
    """Return every window's curve of a chosen column over all steps.

    Args:
        steps: the content of `metrics.csv`.
    """
    if "loss/rec" not in steps or not len(steps):
        return None
    columns = [name for name in steps if name not in ("cbq_step", "window") and not name.startswith("window/")]
    columns = sorted(columns, key=lambda name: SHOWN_FIRST.index(name) if name in SHOWN_FIRST else len(SHOWN_FIRST))
    together = -(-len(steps) // MAX_STEPS)
    groups = steps.groupby(["window", steps.groupby("window").cumcount() // together])
    frame = groups[["cbq_step", *columns]].mean().droplevel(1).reset_index()
    chosen = menu("curve", "curve", columns)
    zoom = alt.selection_interval(bind="scales", encodings=["x"], zoom="wheel![event.shiftKey]")
    lines = (
        alt.Chart(inline(frame))
        .transform_calculate(value="toNumber(datum[curve])")
        .transform_filter("isValid(datum.value) && datum.value > 0")
        .mark_line(strokeWidth=1.5)
        .encode(
            x=alt.X("cbq_step:Q", title="step, all windows together", scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(type="log", nice=False), axis=alt.Axis(format=".4~g")),
            color=alt.Color("window:O", legend=None, scale=alt.Scale(scheme="category10")),
            tooltip=[
                alt.Tooltip("window:O"),
                alt.Tooltip("cbq_step:Q", format="d"),
                alt.Tooltip("value:Q", format=".4g"),
            ],
        )
    )
    seldom = " || ".join(f"indexof(curve, '{kind}') == 0" for kind in SELDOM)
    points = lines.mark_circle(size=25).encode(opacity=alt.when(seldom).then(alt.value(1)).otherwise(alt.value(0)))
    return alt.layer(lines.add_params(zoom), points, title=chosen_in("curve")).add_params(chosen)


def windows(results: Mapping) -> Chart | None:
    """Return each window's loss at its start and at its end, as a share of round-to-nearest's."""
    names = {"rec_loss_first": "at its start", "rec_loss_last": LEARNED}
    rows = [
        {
            "window": number,
            "blocks": f"{window['start']}-{window['stop'] - 1}",
            "state": name,
            "loss": window[key],
            "nearest": window["rec_loss_rtn"],
            "share": window[key] / window["rec_loss_rtn"],
        }
        for number, window in enumerate(results["windows"])
        for key, name in names.items()
        if window[key] is not None and window["rec_loss_rtn"]
    ]
    if not rows:
        return None
    lines = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("window:O", title="window", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("share:Q", title="loss / round-to-nearest's", scale=alt.Scale(zero=False)),
            color=state_color(list(names.values())),
            tooltip=[
                "window:O",
                "blocks:N",
                "state:N",
                alt.Tooltip("loss:Q", format=".4g"),
                alt.Tooltip("nearest:Q", title="round-to-nearest", format=".4g"),
            ],
        )
    )
    return lines + alt.Chart().mark_rule(strokeDash=[4, 4], color=GREY).encode(y=alt.datum(1))


def state_color(states: Sequence[str]) -> alt.Color:
    """Return the colours of what comes before and of what comes after, the same in every chart."""
    scale = alt.Scale(domain=list(states), range=[RED, BLUE])
    return alt.Color("state:N", title=None, scale=scale, legend=alt.Legend(orient="top"))


def heat_map(blocks: pd.DataFrame, kind: str, title: str, form: str) -> Chart | None:
    """Return blocks x linears.

    Args:
        blocks: the content of `blocks.csv`.
        kind: what the columns begin with: `error` or `changed`.
        title: of the colour.
        form: of its numbers.
    """
    columns = [name for name in blocks if name.startswith(f"{kind}/")]
    if not columns:
        return None
    long = blocks.dropna(subset=columns, how="all").melt(["block"], columns, "linear", "value").dropna()
    long["linear"] = long["linear"].str.removeprefix(f"{kind}/")
    order = [name.removeprefix(f"{kind}/") for name in columns]
    return (
        alt.Chart(inline(long))
        .mark_rect()
        .encode(
            x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("linear:N", title=None, sort=order),
            color=alt.Color(
                "value:Q",
                title=title,
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(orient="top", format=form, gradientLength=200),
            ),
            tooltip=["block:O", "linear:N", alt.Tooltip("value:Q", title=title, format=".4g")],
        )
        .properties(height=max(120, 26 * len(columns)) if len(columns) < 24 else 480)
    )


def signal_to_noise(results: Mapping) -> Chart | None:
    """Return the signal-to-noise ratio of every block's output, of round-to-nearest and as learned."""
    rows = [
        {"block": block, "corpus": corpus, "state": state, "snr": decibels}
        for corpus, found in results["agreement"].items()
        for state, part in ((NEAREST, found.get("rtn", {})), (LEARNED, found))
        for block, decibels in enumerate(part.get("block_snr_db", []))
    ]
    if not rows:
        return None
    corpora = list(results["agreement"])
    return (
        alt.Chart(alt.InlineData(values=rows), title=chosen_in("corpus"))
        .transform_filter("datum.corpus == corpus")
        .mark_line(point=True)
        .encode(
            x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("snr:Q", title="signal to noise, dB"),
            color=state_color([NEAREST, LEARNED]),
            tooltip=["block:O", "state:N", alt.Tooltip("snr:Q", format=".1f")],
        )
        .add_params(menu("corpus", "corpus", corpora))
    )


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
            x=alt.X("from_:Q", title="weight / scale + zero point: integers are the grid", axis=alt.Axis(tickMinStep=1)),
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
