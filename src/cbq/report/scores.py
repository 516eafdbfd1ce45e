"""What was measured of a model, in lines and in flat figures."""

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

STATES = ("full_precision", "quantized")
# The metric that a task is known by: the first of these that it has.
HEADLINES = ("acc_norm", "acc", "mrr", "exact_match")


def headline(metrics: Mapping[str, float]) -> str | None:
    """Return the metric that a task is known by, or its first, or None where it has none.

    Example:
        >>> headline({"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6})
        'acc_norm'
        >>> headline({"f1,strict": 0.5, "f1_stderr,strict": 0.1})
        'f1,strict'
    """
    names = [name for name in metrics if "_stderr" not in name]
    return next((name for name in HEADLINES if name in names), names[0] if names else None)


def print_scores(console: Console, scores: Any, what: str) -> None:
    """Print what one state of a model scored, a line a figure.

    Args:
        console: where to print.
        scores: `texts` with the `perplexity` of each corpus, `tasks` with the `metrics` of each task.
        what: the state.
    """
    for corpus, text in scores.texts.items():
        console.print(f"perplexity of {what} on {corpus}: {text.perplexity:.4g}", markup=False)
    for task, score in scores.tasks.items():
        if metric := headline(score.metrics):
            console.print(f"{task} of {what}: {metric} {score.metrics[metric]:.4f}", markup=False)


def summary_figures(measured: Mapping[str, Mapping]) -> dict[str, float]:
    """Return every figure by a path, as W&B's table of runs shows them; what was not measured is left out.

    Args:
        measured: the parts of `results.json`: perplexity, bits_per_byte, zero_shot, agreement.

    Example:
        >>> summary_figures({"perplexity": {"c4": {"rtn": None, "quantized": 7.0}}})
        {'perplexity/c4/quantized': 7.0}
    """
    figures: dict[str, float] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{path}/{key}" if path else key, inner)
        elif isinstance(value, int | float):
            figures[path] = value

    walk("", measured)
    return figures


def score_tables(measured: Mapping[str, Mapping]) -> list[Table]:
    """Return the tables of a model and its checkpoint, or of one of them: perplexities, and tasks.

    Args:
        measured: the parts of `results.json`.
    """
    table = Table(title="Perplexity, and bits a byte of text", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("corpus", overflow="fold")
    for heading in ("full precision", "quantized"):
        table.add_column(heading, justify="right", no_wrap=True)
    for corpus, perplexity in measured["perplexity"].items():
        bits = measured["bits_per_byte"][corpus]
        shown = [f"{perplexity[state]:.4g} ({bits[state]:.4f})" if perplexity[state] else "-" for state in STATES]
        table.add_row(Text(corpus), *shown)
    tables = [table] if measured["perplexity"] else []
    return tables + ([task_table(measured["zero_shot"])] if measured["zero_shot"] else [])


def task_table(zero_shot: Mapping[str, Mapping]) -> Table:
    """Return the scores of tasks with their standard errors, and what quantization did to the same items.

    Args:
        zero_shot: the part of `results.json`.
    """
    table = Table(title="Zero-shot", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task and metric", overflow="fold")
    for heading in ("full precision", "quantized", "difference", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for task, row in zero_shot.items():
        metrics = row["quantized"] or row["full_precision"]
        for metric in (name for name in metrics if "_stderr" not in name):
            found = row["difference"].get(metric)
            table.add_row(
                Text(f"{task} {metric}"),
                *(with_error(row[state], metric) for state in STATES),
                f"{found['mean']:+.3f} ±{found['stderr']:.3f}" if found else "-",
                f"{found['p_value']:.2g}" if found else "-",
            )
    return table


def with_error(metrics: Mapping[str, float], metric: str) -> str:
    """Return a metric and its standard error.

    Example:
        >>> with_error({"acc": 0.5, "acc_stderr": 0.01}, "acc")
        '0.500 ±0.010'
        >>> with_error({}, "acc")
        '-'
    """
    if metric not in metrics:
        return "-"
    name, comma, variant = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{variant}")
    return f"{metrics[metric]:.3f}" + (f" ±{error:.3f}" if error is not None and math.isfinite(error) else "")


def agreement_lines(agreement: Mapping[str, Mapping]) -> list[str]:
    """Return in words how close a quantized model is to full precision, a line a corpus.

    Args:
        agreement: the part of `results.json`.
    """
    return [
        f"on {corpus}: KL {row['kl_divergence']:.4f} nats a token, same first choice {row['top1']:.1%}, "
        f"SNR {row['block_snr_db'][0]:.1f} dB after the first block, {row['block_snr_db'][-1]:.1f} dB after the last"
        for corpus, row in agreement.items()
    ]
