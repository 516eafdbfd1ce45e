"""What became of a window."""

from dataclasses import dataclass

from torch import nn

from cbq.activations import ActivationCache
from cbq.reconstruction.windows import Window


@dataclass
class WindowResult:
    """What became of a window; losses are reconstruction losses with hard rounding.

    Args:
        start: first block.
        stop: one past the last block.
        rec_loss_first: before the window was solved.
        rec_loss_last: after.
        rec_loss_rtn: rounded to nearest, each weight's range covered whole; with gains of norms as they were then.
        changed_integers: share of the window's integers that differ from round-to-nearest.
        wall_time_seconds: for solving, measuring included.
        guard: what kept the window sound, in words, or None: nothing was needed.
    """

    start: int
    stop: int
    rec_loss_first: float
    rec_loss_last: float
    rec_loss_rtn: float
    changed_integers: float
    wall_time_seconds: float
    guard: str | None = None


def window_blocks(window: Window, cache: ActivationCache) -> list[nn.Module]:
    """Return the window's blocks."""
    return list(cache.blocks[window.start : window.stop])
