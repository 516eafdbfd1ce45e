"""Figure 1 and the sensitivity scan as pictures: PNG to look at, SVG for papers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMATS = ("png", "svg")
DECADES = 4  # of absolute values that a colour scale of a Hessian covers


def plot_figure(figure: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw `figure1.png` and `.svg`: a row a bit width, the parts (a), (b) and (c) beside each other.

    Each column has one colour scale, so that bit widths compare.

    Args:
        figure: of `analysis.json`.
        folder: where the files go.

    Returns:
        the names of the files.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    by_bits = figure["by_bits"]
    canvas, axes = plt.subplots(len(by_bits), 3, figsize=(14, 4.2 * len(by_bits)), squeeze=False, layout="constrained")
    norms = {}
    for part in ("weights", "scales"):
        values = np.abs([found[part]["hessian"] for found in by_bits.values()])
        largest = max(values[np.isfinite(values)].max(initial=0), np.finfo(np.float32).tiny)
        norms[part] = LogNorm(largest / 10**DECADES, largest, clip=True)
    first = figure["first_block"]
    for row, (bits, found) in zip(axes, by_bits.items(), strict=True):
        for axis, part in zip(row, ("weights", "scales"), strict=False):
            image = axis.imshow(np.abs(found[part]["hessian"]), norm=norms[part], cmap="viridis")
            mass = found[part]["off_diagonal_mass"]
            canvas.colorbar(image, ax=axis, label="|H|")
            what = "(a) weights of " + figure["linear"] if part == "weights" else "(b) scales of blocks"
            axis.set_title(f"{what}\n{bits} bits: {mass:.1%} off the diagonal", fontsize=10)
        row[0].set(xlabel="weight", ylabel="weight")
        num_columns = len(figure["columns"])
        for edge in range(num_columns, len(found["weights"]["hessian"]), num_columns):  # between output channels
            row[0].axhline(edge - 0.5, color="white", linewidth=0.5)
            row[0].axvline(edge - 0.5, color="white", linewidth=0.5)
        row[1].set(xlabel="block", ylabel="block")
        surface = np.array(found["surface"]["loss"]).T  # the first block along x
        multipliers = figure["multipliers"]
        image = row[2].contourf(multipliers, multipliers, np.ma.masked_invalid(surface), levels=20, cmap="viridis")
        canvas.colorbar(image, ax=row[2], label="loss, nats a token")
        best = found["surface"]["best"]
        row[2].plot(*best, marker="*", color="tab:red", markersize=14, linestyle="none", clip_on=False, label="lowest")
        row[2].plot(1, 1, marker="o", color="white", linestyle="none", label="round-to-nearest")
        row[2].legend(fontsize=8)
        row[2].set(xlabel=f"step sizes of block {first}, times", ylabel=f"of block {first + 1}, times")
        share = found["surface"]["interaction_share"]
        row[2].set_title(f"(c) loss over two blocks' scales\n{bits} bits: {share:.2%} interaction", fontsize=10, pad=10)
    return save(canvas, folder / "figure1")


def plot_sensitivity(found: Mapping[str, Any], suggestion: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw `sensitivity.png` and `.svg`: KL divergence by block and linear, a panel a bit width, and the suggestion.

    Args:
        found: `sensitivity` of `analysis.json`.
        suggestion: likewise.
        folder: where the files go.

    Returns:
        the names of the files.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    cells = {name: (int(name.split(".", 2)[1]), name.split(".", 2)[2]) for name in found["linears"]}
    columns = list(dict.fromkeys(linear for _, linear in cells.values()))
    num_blocks = max(block for block, _ in cells.values()) + 1
    widths = list(next(iter(found["linears"].values())))

    def grid(values: Mapping[str, float]) -> np.ndarray:
        """Return values by name as (blocks, linears); nan where a block has no such linear."""
        filled = np.full((num_blocks, len(columns)), np.nan)
        for name, value in values.items():
            block, linear = cells[name]
            filled[block, columns.index(linear)] = value
        return filled

    panels = {
        f"KL divergence, {width} bits alone": grid(
            {name: by_width[width]["kl_divergence"] for name, by_width in found["linears"].items()}
        )
        for width in widths
    }
    present = [panel[np.isfinite(panel) & (panel > 0)] for panel in panels.values()]
    values = np.concatenate(present)
    norm = LogNorm(values.min(), values.max()) if values.size else None
    size = 1.6 + 0.42 * len(columns)
    canvas, axes = plt.subplots(
        1,
        len(panels) + 1,
        figsize=(size * (len(panels) + 1), 2.4 + 0.34 * num_blocks),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=False):
        image = axis.imshow(panel, norm=norm, cmap="viridis", aspect="auto")
        axis.set_title(title, fontsize=10)
    canvas.colorbar(image, ax=axes[0, : len(panels)].tolist(), label="nats a token", shrink=0.8)
    chosen = grid(suggestion["weight_bits"])
    axes[0, -1].imshow(
        chosen, cmap="Blues", aspect="auto", vmin=min(map(int, widths)) - 1, vmax=max(map(int, widths)) + 1
    )
    for (block, column), width in np.ndenumerate(chosen):
        if np.isfinite(width):
            colour = "white" if width == max(map(int, widths)) else "black"
            axes[0, -1].text(column, block, f"{width:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes[0, -1].set_title(f"suggested bits: {suggestion['effective_bits']:.3f} on average", fontsize=10)
    for axis in axes[0]:
        axis.set_xticks(range(len(columns)), [name.split(".", 1)[-1] for name in columns], rotation=60, ha="right")
        axis.set_yticks(range(num_blocks) if num_blocks <= 16 else range(0, num_blocks, 4))
    axes[0, 0].set_ylabel("block")
    return save(canvas, folder / "sensitivity")


def save(canvas: Any, path: Path) -> list[str]:
    """Write a figure in every format, close it, and return the names of the files."""
    from matplotlib import pyplot as plt

    canvas.get_layout_engine().execute(canvas)
    canvas.set_layout_engine("none")  # once is enough: it takes longer than drawing
    names = [f"{path.name}.{kind}" for kind in FORMATS]
    for name in names:
        canvas.savefig(path.with_name(name), dpi=120)
    plt.close(canvas)
    return names
