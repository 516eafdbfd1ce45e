"""A run's charts, by Vega-Altair: each is one specification, for the page (interactive) and for files (PNG, SVG)."""

from collections.abc import Mapping, Sequence

import altair as alt
import pandas as pd

MAX_STEPS = 3000  # points of the curves, all windows together
# The order of a page's menu; what a run has not is left out.
SHOWN_FIRST = ("loss/rec", "loss/l2", "loss/kld", "loss/com", "loss/total", "beta")
SELDOM = ("rounding/", "drift/")  # looked at once in many steps: points beside the line
NEAREST, LEARNED = "round-to-nearest", "learned"
BLUE, RED, GREY = "#2e86c1", "#d1495b", "#888888"  # seen on light and on dark
Chart = alt.Chart | alt.LayerChart


def inline(frame: pd.DataFrame) -> alt.InlineData:
    """Return a frame as the CSV text that a page carries: a third of what rows in JSON would take."""
    text = frame.to_csv(index=False, float_format="%.5g")
    # Said, not guessed: blocks would be texts, of which 10 comes before 2.
    parse = dict.fromkeys(frame.select_dtypes("number"), "number")
    return alt.InlineData(values=text, format=alt.CsvDataFormat(type="csv", parse=parse))


def menu(name: str, label: str, options: Sequence[str | int], first: str | int | None = None) -> alt.Parameter:
    """Return a parameter that a menu on the page sets; it starts at `first`, or at the first option."""
    value = options[0] if first is None else first
    return alt.param(name=name, value=value, bind=alt.binding_select(options=list(options), name=f"{label} "))


def step_axis() -> alt.X:
    """Return the axis of a run's steps."""
    axis = alt.Axis(tickMinStep=1, format="d")
    return alt.X("cbq_step:Q", title="step, all windows together", scale=alt.Scale(nice=False), axis=axis)


def numbers(name: str) -> alt.X:
    """Return the axis of blocks or windows: their numbers, as many as there is room for."""
    return alt.X(f"{name}:O", title=name, axis=alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=6))


def chosen_in(expression: str) -> alt.Title:
    """Return a title that says what is chosen in the menus: files have none."""
    return alt.Title(alt.ExprRef(expression), anchor="start", fontSize=12, fontWeight="normal")


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
        .transform_calculate(value="datum[curve]")
        .transform_filter("isValid(datum.value) && datum.value > 0")
        .mark_line(strokeWidth=1.5)
        .encode(
            x=step_axis(),
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


def windows(solved: Sequence[Mapping]) -> Chart | None:
    """Return each window's loss at its start and at its end, as a share of round-to-nearest's.

    Args:
        solved: as in `results.json`.
    """
    names = {"rec_loss_first": "at its start", "rec_loss_last": LEARNED}
    rows = [
        {
            "window": number,
            "blocks": f"{window['start']}-{window['stop'] - 1}" if "start" in window else "",
            "state": name,
            "loss": window[key],
            "nearest": window["rec_loss_rtn"],
            "share": window[key] / window["rec_loss_rtn"],
        }
        for number, window in enumerate(solved)
        for key, name in names.items()
        if window[key] is not None and window["rec_loss_rtn"]
    ]
    if not rows:
        return None
    lines = (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line(point=True)
        .encode(
            x=numbers("window"),
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
            x=numbers("block"),
            y=alt.Y("linear:N", title=None, sort=order),
            color=alt.Color(
                "value:Q",
                title=title,
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(orient="top", format=form, gradientLength=200, tickCount=3),
            ),
            tooltip=["block:O", "linear:N", alt.Tooltip("value:Q", title=title, format=".4g")],
        )
        .properties(height=max(120, 26 * len(columns)) if len(columns) < 24 else 480)
    )


def signal_to_noise(agreement: Mapping) -> Chart | None:
    """Return the signal-to-noise ratio of every block's output, of round-to-nearest and as learned.

    Args:
        agreement: as in `results.json`.
    """
    rows = [
        {"block": block, "corpus": corpus, "state": state, "snr": decibels}
        for corpus, found in agreement.items()
        for state, part in ((NEAREST, found.get("rtn", {})), (LEARNED, found))
        for block, decibels in enumerate(part.get("block_snr_db", []))
    ]
    if not rows:
        return None
    return (
        alt.Chart(alt.InlineData(values=rows), title=chosen_in("corpus"))
        .transform_filter("datum.corpus == corpus")
        .mark_line(point=True)
        .encode(
            x=numbers("block"),
            y=alt.Y("snr:Q", title="signal to noise, dB"),
            color=state_color([NEAREST, LEARNED]),
            tooltip=["block:O", "state:N", alt.Tooltip("snr:Q", format=".1f")],
        )
        .add_params(menu("corpus", "corpus", list(agreement)))
    )
