"""What a run prints at its end: perplexities, two texts, the cost, and where everything is."""

import math
import re
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cbq.cost import format_duration
from cbq.report.scores import agreement_lines, task_table

# Everything but newline and tab: generated text must not be able to steer the terminal.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def gap_closed(full_precision: float | None, rtn: float | None, quantized: float | None) -> float | None:
    """Return the share of round-to-nearest's loss of quality that a method wins back.

    Args:
        full_precision: Perplexity of the model before quantization; None is one that was not measured.
        rtn: Perplexity after round-to-nearest.
        quantized: Perplexity after the method.

    Returns:
        1.0 for a perplexity as before quantization, 0.0 for round-to-nearest's, negative for a worse one. None when
        round-to-nearest loses nothing or a perplexity is not finite: there is no gap to speak of.

    Example:
        >>> gap_closed(full_precision=5.0, rtn=9.0, quantized=6.0)
        0.75
        >>> gap_closed(full_precision=5.0, rtn=5.0, quantized=5.0) is None
        True
    """
    if not all(value is not None and math.isfinite(value) for value in (full_precision, rtn, quantized)):
        return None
    gap = rtn - full_precision
    return (rtn - quantized) / gap if gap > 0 else None


def print_summary(console: Console, results: dict, texts: dict[str, str], folder: Path) -> None:
    """Print the outcome of a finished run.

    Args:
        console: Where to print; readable from 80 columns on.
        results: The content of `results.json`, but numbers that are not finite as they are.
        texts: Title -> generated text, printed in this order and literally.
        folder: The run folder. What is not there is not listed.
    """
    console.print()
    if results["perplexity"]:
        console.print(_perplexity_table(results))
    if results["zero_shot"]:
        console.print(task_table(results["zero_shot"]))
    for line in agreement_lines(results["agreement"]):
        _print_line(console, "Agreement", line)
    if results["agreement"]:
        console.print()
    for title, text in texts.items():
        console.print(Text(title, style="bold"))
        console.print(Text(CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text.strip())))
        console.print()
    _print_line(console, "Cost", _cost(results["cost"]))
    written = {
        "Checkpoint": "checkpoint",
        "Export": "export",
        "Results": "results.json",
        "Curves": "metrics.csv",
        "W&B": "wandb",
        "Report": "report.html",
    }
    for label, name in written.items():
        if (folder / name).exists() and (folder / name).stat().st_size:
            _print_line(console, label, str(folder / name))


def _perplexity_table(results: dict) -> Table:
    table = Table(title=Text(f"Perplexity of {results['model']}, {results['scheme']}"), box=box.SIMPLE_HEAD)
    table.add_column("corpus", overflow="fold")
    learned = any(window["changed_integers"] for window in results["windows"])
    heading_of_method = results["method"].upper() if learned else "quantized"
    for heading in ("full precision", "round-to-nearest", heading_of_method, "gap closed"):
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for corpus, row in results["perplexity"].items():
        values = (row["full_precision"], row["rtn"], row["quantized"])
        closed = gap_closed(*values)
        cells = [*map(format_perplexity, values), "-" if closed is None else f"{closed:.1%}"]
        table.add_row(Text(corpus), *cells)
    return table


def format_perplexity(value: float | None) -> str:
    """Return a perplexity with the digits that it is compared by; `-` for none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    if value < 1_000:
        return f"{value:.2f}"
    return f"{value:,.0f}" if value < 1_000_000 else f"{value:.2e}"


def _cost(cost: dict) -> str:
    memory = f"{cost['peak_host_memory_gib']:.1f} GiB"
    if cost["peak_device_memory_gib"] is not None:
        memory += f" host, {cost['peak_device_memory_gib']:.1f} GiB device"
    total, reconstruction, evaluation = (
        format_duration(cost[f"{phase}_seconds"]) for phase in ("wall_time", "reconstruction", "evaluation")
    )
    return f"{total} (reconstruction {reconstruction}, evaluation {evaluation}), peak memory {memory}"


def _print_line(console: Console, label: str, text: str) -> None:
    """Print a labelled line whole, however narrow the console: a path in two pieces cannot be copied."""
    console.print(Text.assemble((f"{label:<11}", "bold"), text), soft_wrap=True)
