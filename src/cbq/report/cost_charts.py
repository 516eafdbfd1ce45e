"""A run's charts of memory and time."""

from collections.abc import Mapping

import altair as alt
import pandas as pd

from cbq.report.charts import Chart, inline, step_axis


def memory(steps: pd.DataFrame) -> Chart | None:
    """Return the memory that was held over the steps."""
    columns = [name for name in steps if name.startswith("memory/")]
    if not columns:
        return None
    every = -(-len(steps) // 500)
    long = steps.iloc[::every].melt(["cbq_step"], columns, "where", "gib").dropna()
    long["where"] = long["where"].str.removeprefix("memory/")
    return (
        alt.Chart(inline(long))
        .mark_line()
        .encode(
            x=step_axis(),
            y=alt.Y("gib:Q", title="GiB held"),
            color=alt.Color("where:N", title=None, legend=alt.Legend(orient="top")),
            tooltip=[alt.Tooltip("cbq_step:Q", format="d"), "where:N", alt.Tooltip("gib:Q", format=".2f")],
        )
        .properties(height=180)
    )


def time_line(results: Mapping) -> Chart | None:
    """Return what the run's time went into: each window, evaluation, and the rest."""
    cost, spent = results["cost"], []
    for number, window in enumerate(results["windows"]):
        blocks = f"blocks {window['start']}-{window['stop'] - 1}"
        spent.append({"phase": "windows", "part": f"window {number}, {blocks}", "seconds": window["wall_time_seconds"]})
    in_windows = sum(each["seconds"] for each in spent)
    others = {"between windows": cost["reconstruction_seconds"] - in_windows, "evaluation": cost["evaluation_seconds"]}
    others["the rest"] = cost["wall_time_seconds"] - cost["reconstruction_seconds"] - cost["evaluation_seconds"]
    spent += [{"phase": name, "part": name, "seconds": max(0.0, seconds)} for name, seconds in others.items()]
    rows = [each | {"number": number} for number, each in enumerate(spent)]
    return (
        alt.Chart(alt.InlineData(values=rows))
        .mark_bar(stroke="white", strokeWidth=0.5)
        .encode(
            x=alt.X("seconds:Q", title="seconds"),
            y=alt.Y("phase:N", title=None, sort=["windows", *others]),
            order="number:O",
            color=alt.Color("phase:N", legend=None),
            tooltip=["part:N", alt.Tooltip("seconds:Q", format=".1f")],
        )
        .properties(height=120)
    )
