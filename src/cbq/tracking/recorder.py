"""What is recorded of a run while its windows are solved: steps, windows and blocks."""

from collections.abc import Sequence

import torch
from torch import nn

from cbq.quant.linear import QuantLinear
from cbq.reconstruction.curves import WindowCurves, read
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.windows import Window
from cbq.tracking.sink import Row
from cbq.tracking.tracker import Tracker


class RunRecorder:
    """Gives a tracker the rows of every window, and those of the blocks that it finished.

    Args:
        tracker: takes them; to be started before the first window.

    Attributes:
        curves: the callback that must hear of every fit.
        window: the number of the next window.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.window = 0
        self.rows: list[dict[str, float]] = []
        self.curves = WindowCurves(self.rows.extend)

    def begin(self, plan: Sequence[Window], blocks: nn.ModuleList) -> None:
        """Hear of all windows and of the model's blocks."""
        self.plan, self.blocks = plan, blocks

    @property
    def step(self) -> int:
        """The next step's number: where a run that is interrupted now would go on."""
        return self.curves.step

    def state_dict(self) -> dict[str, int]:
        """Return what the rows of a run that goes on go on from."""
        return {"step": self.step, "window": self.window}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.window = state["window"]
        self.curves.step, self.curves.window = state["step"], self.window - 1

    def finish_window(self, result: WindowResult) -> Window:
        """Record a window that is solved, and return it; its linears must still be in the learned state.

        What became of it stands beside its last step.
        """
        if not self.rows:  # solved without steps: it has one for itself
            self.rows.append({"cbq_step": self.curves.step, "window": self.window})
            self.curves.step += 1
        self.rows[-1] |= {
            "window/loss_rtn": result.rec_loss_rtn,
            "window/loss_first": result.rec_loss_first,
            "window/loss_last": result.rec_loss_last,
            "window/changed_integers": result.changed_integers,
            "window/seconds": result.wall_time_seconds,
        }
        self.tracker.log(self.rows)
        self.rows.clear()
        window = self.plan[self.window]
        rows = [{"block": index, "cbq_step": self.step - 1} for index in range(window.start, window.finished)]
        figures = read([figures_of_block(self.blocks[row["block"]]) for row in rows])
        self.tracker.log_blocks([row | found for row, found in zip(rows, figures, strict=True)])
        self.curves.window = self.window
        self.window += 1
        return window


def figures_of_block(block: nn.Module) -> dict[str, torch.Tensor]:
    """Return of each linear of a block, by its name, what rounding does to its weight, () each, on the device.

    Returns:
        `error/<linear>`: |W_q - W|^2 / |W|^2, W as preprocessing left it. `changed/<linear>`: the share of integers
        away from round-to-nearest's at the initial scale.
    """
    linears = {
        name: linear
        for name, linear in block.named_modules()
        if isinstance(linear, QuantLinear) and linear.weight_quantizer is not None
    }
    errors = {f"error/{name}": linear.relative_error() for name, linear in linears.items()}
    changed = {f"changed/{name}": each.rounding_counts()[1] / each.weight.numel() for name, each in linears.items()}
    return errors | changed


def agreement_rows(agreement: dict[str, dict]) -> list[Row]:
    """Return the blocks' signal-to-noise ratios in decibels, before and after, as rows.

    Args:
        agreement: the part of `results.json`.

    Example:
        >>> agreement_rows({"c4": {"block_snr_db": [9.0], "rtn": {"block_snr_db": [3.0]}}})
        [{'block': 0, 'snr_db/c4/quantized': 9.0, 'snr_db/c4/rtn': 3.0}]
    """
    rows: dict[int, dict[str, float]] = {}
    for corpus, found in agreement.items():
        for state, part in (("quantized", found), ("rtn", found.get("rtn", {}))):
            for block, decibels in enumerate(part.get("block_snr_db", [])):
                row = rows.setdefault(block, {"block": block})
                row[f"snr_db/{corpus}/{state}"] = decibels
    return list(rows.values())
