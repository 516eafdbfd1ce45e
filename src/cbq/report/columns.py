"""What a table's columns hold: perplexities by corpus, scores by task, and what a run cost."""

from collections.abc import Mapping

from cbq.report.scores import headline

SECONDS = "seconds"  # of reconstruction
MEMORY = "GiB"  # the peak: of the GPU where there is one
COSTS = frozenset({SECONDS, MEMORY})
PERCENT = 100  # scores of tasks are shown in percent, as papers do
# Tasks that the paper reports by more than one metric, in its order.
SEVERAL = {"mutual": ("mrr", "r@1", "r@2")}


def is_task(what: str) -> bool:
    """Return whether a column holds a task's score, of which more is better; its name is the task's and the metric's.

    Example:
        >>> is_task("piqa acc_norm"), is_task("c4")
        (True, False)
    """
    return " " in what


def measured(run: Mapping) -> list[str]:
    """Return the columns of what a run measured: its corpora, then its tasks.

    Args:
        run: the content of `results.json`.

    Example:
        >>> measured({"perplexity": {"c4": {}}, "zero_shot": {"piqa": {"quantized": {"acc": 0.5, "acc_norm": 0.6}}}})
        ['c4', 'piqa acc_norm']
    """
    found = [*run.get("perplexity", {})]
    for task, row in run.get("zero_shot", {}).items():
        higher = row.get("higher_is_better", {})
        metric = headline(row["quantized"])
        # A perplexity among tasks is no share of anything.
        if metric and higher.get(metric.partition(",")[0], True):
            found += [f"{task} {each}" for each in SEVERAL.get(task, [metric])]
    return found


def figure_of(run: Mapping, what: str, state: str) -> float | None:
    """Return what a run says of a column: a perplexity, or a score in percent; None where it was not measured.

    Args:
        run: the content of `results.json`.
        what: a column.
        state: `full_precision` or `quantized`.
    """
    if is_task(what):
        task, _, metric = what.partition(" ")
        score = run.get("zero_shot", {}).get(task, {}).get(state, {}).get(metric)
        return None if score is None else PERCENT * score
    return run.get("perplexity", {}).get(what, {}).get(state)


def cost_of(run: Mapping, what: str) -> float:
    """Return the seconds of a finished run's reconstruction, or its peak memory."""
    cost = run["cost"]
    if what == SECONDS:
        return cost["reconstruction_seconds"]
    return cost["peak_host_memory_gib"] if cost["peak_device_memory_gib"] is None else cost["peak_device_memory_gib"]
