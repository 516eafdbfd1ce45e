"""A run's charts, by Vega-Altair: each is one specification, for the page (interactive) and for files (PNG, SVG)."""

from collections.abc import Mapping, Sequence

import altair as alt
import pandas as pd

MAX_STEPS = 3000  # points of the curves, all windows together
# The order of a page's menu; what a run has not is left out.
SHOWN_FIRST = ("loss/rec", "loss/l2", "loss/kld", "loss/com", "loss/total", "beta")
NOT_CURVES = ("cbq_step", "window")
BEFORE, AFTER = "before", "after"
Chart = alt.Chart | alt.LayerChart


def inline(frame: pd.DataFrame) -> alt.InlineData:
    """Return a frame as the CSV text that a page carries: a third of what rows in JSON would take."""
    text = frame.to_csv(index=False, float_format="%.5g")
    return alt.InlineData(values=text, format=alt.CsvDataFormat(type="csv"))


def menu(name: str, label: str, options: Sequence[str]) -> alt.Parameter:
    """Return a parameter that a menu on the page sets; it starts at the first option."""
    return alt.param(name=name, value=options[0], bind=alt.binding_select(options=list(options), name=f"{label} "))


def curves(steps: pd.DataFrame) -> Chart | None:
    """Return every window's curve of a chosen column over all steps.

    Args:
        steps: the content of `metrics.csv`.
    """
    if "loss/rec" not in steps or not len(steps):
        return None
    columns = [
        name for name in steps if name not in NOT_CURVES and not name.startswith(("window/", "drift/", "rounding/"))
    ]
    columns = sorted(columns, key=lambda name: SHOWN_FIRST.index(name) if name in SHOWN_FIRST else len(SHOWN_FIRST))
    together = -(-len(steps) // MAX_STEPS)
    groups = steps.groupby(["window", steps.groupby("window").cumcount() // together])
    frame = groups[["cbq_step", *columns]].mean().droplevel(1).reset_index()
    safe = {name: name.replace("/", "_") for name in columns}
    chosen = menu("curve", "curve", [safe[name] for name in columns])
    zoom = alt.selection_interval(bind="scales", encodings=["x"], zoom="wheel![event.shiftKey]")
    return (
        alt.Chart(inline(frame.rename(columns=safe)))
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
        .add_params(chosen, zoom)
    )


def windows(results: Mapping) -> Chart | None:
    """Return each window's loss at its start and at its end, as a share of round-to-nearest's."""
    names = {"rec_loss_first": "at its start", "rec_loss_last": "learned"}
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
            color=alt.Color("state:N", title=None, sort=list(names.values()), legend=alt.Legend(orient="top")),
            tooltip=[
                "window:O",
                "blocks:N",
                "state:N",
                alt.Tooltip("loss:Q", format=".4g"),
                alt.Tooltip("nearest:Q", title="round-to-nearest", format=".4g"),
            ],
        )
    )
    return lines + alt.Chart().mark_rule(strokeDash=[4, 4], color="#888888").encode(y=alt.datum(1))


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
        for state, part in (("round-to-nearest", found.get("rtn", {})), ("learned", found))
        for block, decibels in enumerate(part.get("block_snr_db", []))
    ]
    if not rows:
        return None
    corpora = list(results["agreement"])
    return (
        alt.Chart(alt.InlineData(values=rows))
        .transform_filter("datum.corpus == corpus")
        .mark_line(point=True)
        .encode(
            x=alt.X("block:O", title="block", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("snr:Q", title="signal to noise, dB"),
            color=alt.Color("state:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=["block:O", "state:N", alt.Tooltip("snr:Q", format=".1f")],
        )
        .add_params(menu("corpus", "corpus", corpora))
    )


def outliers(found: Sequence[Mapping], what: str, by: str) -> Chart | None:
    """Return the channels of a chosen place before and after preprocessing, with the thresholds of Algorithm 1.

    Args:
        found: a part of `outliers.json`.
        what: whose channels: `activations` or `weights`.
        by: the label of the y axis.

    Source: Figure 3.
    """
    if not found:
        return None
    names = [f"{each['block']} {each['name']}" for each in found]
    loudest = max(
        range(len(found)), key=lambda index: max(found[index]["before"]) / (found[index]["threshold"] or 1e-9)
    )
    names_in_menu = [names[loudest], *names]
    points = pd.DataFrame(
        [
            (name, channel, state, value)
            for name, each in zip(names, found, strict=True)
            for state in (BEFORE, AFTER)
            for channel, value in zip(each["channels"], each[state], strict=True)
        ],
        columns=["place", "channel", "state", "value"],
    )
    rules = pd.DataFrame(
        [
            (name, threshold, each[key])
            for name, each in zip(names, found, strict=True)
            for threshold, key in (("coarse", "coarse_threshold"), ("fine", "threshold"))
        ],
        columns=["place", "threshold", "value"],
    )
    place = menu(what, "where", list(dict.fromkeys(names_in_menu)))
    color = alt.Scale(domain=[BEFORE, AFTER], range=["#d1495b", "#2e86c1"])
    dots = (
        alt.Chart(inline(points))
        .transform_filter(f"datum.place == {what}")
        .mark_circle(opacity=0.75)
        .encode(
            x=alt.X("channel:Q", title="channel", scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=by),
            color=alt.Color("state:N", title=None, scale=color, legend=alt.Legend(orient="top")),
            tooltip=["channel:Q", "state:N", alt.Tooltip("value:Q", format=".4g")],
        )
    )
    lines = (
        alt.Chart(inline(rules))
        .transform_filter(f"datum.place == {what}")
        .mark_rule(strokeWidth=1.5, color="#888888")
        .encode(
            y="value:Q",
            strokeDash=alt.StrokeDash("threshold:N", title="threshold", legend=alt.Legend(orient="top")),
            tooltip=["threshold:N", alt.Tooltip("value:Q", format=".4g")],
        )
    )
    return alt.layer(dots, lines).add_params(place)


def weights(blocks: Sequence[Mapping]) -> Chart | None:
    """Return how a chosen linear's weights lie on the integer grid, and how often each integer is taken.

    Args:
        blocks: the contents of `weights/block_*.json`.
    """
    bars, integers = [], []
    for block in blocks:
        for name, found in block["linears"].items():
            place, total = f"{block['block']} {name}", sum(found["weights"]) or 1
            width = (found["high"] - found["low"]) / len(found["weights"])
            bars += [
                (place, found["low"] + width * number, found["low"] + width * (number + 1), count / total / width)
                for number, count in enumerate(found["weights"])
                if count
            ]
            integers += [(place, number, count / total) for number, count in enumerate(found["integers"]) if count]
    if not bars:
        return None
    bars = pd.DataFrame(bars, columns=["linear", "low", "high", "density"])
    integers = pd.DataFrame(integers, columns=["linear", "integer", "share"])
    linear = menu("linear", "linear", list(dict.fromkeys(bars["linear"])))
    histogram = (
        alt.Chart(inline(bars))
        .transform_filter("datum.linear == linear")
        .mark_bar(color="#2e86c1", opacity=0.6, binSpacing=0)
        .encode(
            x=alt.X("low:Q", title="weight / scale + zero point: integers are the grid", axis=alt.Axis(tickMinStep=1)),
            x2="high:Q",
            y=alt.Y("density:Q", title="share a step of the grid"),
            y2=alt.datum(0),
            tooltip=[alt.Tooltip("low:Q", format=".2f"), alt.Tooltip("density:Q", format=".4f")],
        )
    )
    grid = alt.Chart(inline(integers)).transform_filter("datum.linear == linear")
    stems = grid.mark_rule(color="#d1495b", strokeWidth=2).encode(x="integer:Q", y="share:Q", y2=alt.datum(0))
    heads = grid.mark_circle(color="#d1495b", size=45, opacity=1).encode(
        x="integer:Q",
        y="share:Q",
        tooltip=["integer:Q", alt.Tooltip("share:Q", title="share of weights that take it", format=".2%")],
    )
    return alt.layer(histogram, stems, heads).add_params(linear)
