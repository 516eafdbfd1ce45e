"""An analysis on one page of a terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

MOST_SENSITIVE = 5  # linears that are named


def print_figure(console: Console, figure: Mapping[str, Any]) -> None:
    """Print what Figure 1 comes to, a row a bit width.

    Args:
        console: where to print.
        figure: of `analysis.json`.
    """
    first = figure["first_block"]
    console.print(
        f"\nFigure 1: |H| off the diagonal, (a) of weights of {figure['linear']}, (b) of the scales of blocks; "
        f"(c) the loss over the scales of blocks {first} and {first + 1}",
        markup=False,
    )
    table = Table(box=box.SIMPLE)
    for column in (
        "bits",
        "(a)",
        "(b)",
        "mean |H|\noff / on",
        "(c) inter-\naction",
        "(c) best at",
        "loss at 1,\nat best",
    ):
        table.add_column(column, justify="right")
    for bits, found in figure["by_bits"].items():
        scales, surface = found["scales"], found["surface"]
        table.add_row(
            bits,
            f"{found['weights']['off_diagonal_mass']:.1%}",
            f"{scales['off_diagonal_mass']:.1%}",
            f"{scales['mean_off_diagonal']:.3g} / {scales['mean_diagonal']:.3g}",
            f"{surface['interaction_share']:.2%}",
            ", ".join(f"{multiplier:.2f}" for multiplier in surface["best"]),
            f"{surface['loss_unchanged']:.2f}, {surface['loss_best']:.2f}",
        )
    console.print(table)


def print_scan(console: Console, results: Mapping[str, Any]) -> None:
    """Print which blocks and linears are sensitive, what is suggested, and how it was checked.

    Args:
        console: where to print.
        results: what `analysis.json` holds.
    """
    found, suggestion, checked = results["sensitivity"], results["suggestion"], results["check"]
    widths = list(next(iter(found["blocks"].values())))
    worst = sorted(found["linears"].items(), key=lambda each: -each[1][widths[0]]["kl_divergence"])[:MOST_SENSITIVE]
    console.print("Quantized alone: KL divergence from full precision, nats a token")
    table = Table(box=box.SIMPLE)
    table.add_column("")
    for width in widths:
        table.add_column(f"{width} bits", justify="right")
    for section in (found["blocks"].items(), worst):
        for name, by_width in section:
            table.add_row(name, *(f"{by_width[width]['kl_divergence']:.5f}" for width in widths))
        table.add_section()
    console.print(table)
    console.print("Round-to-nearest")
    table = Table(box=box.SIMPLE)
    for column in ("", "effective bits", *(f"perplexity on {corpus}" for corpus in checked["uniform"]["perplexity"])):
        table.add_column(column, justify="right" if column else "left")
    names = {"full_precision": "full precision", "uniform": results["scheme"], "suggested": "suggested"}
    for state, name in names.items():
        bits = checked[state]["effective_bits"]
        table.add_row(
            name,
            "" if bits is None else f"{bits:.4f}",
            *(f"{perplexity:.4f}" for perplexity in checked[state]["perplexity"].values()),
        )
    console.print(table)
    console.print("Suggested, for this or any other method:")
    console.print(suggestion["command"], soft_wrap=True, markup=False)
