"""What became of a window, and how that is measured."""

from dataclasses import dataclass

import torch
from torch import nn

from cbq.activations import ActivationCache, autocast
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.windows import Window
from cbq.streams.kinds import Stream

MEASURED_SEGMENTS = 16  # a window's loss is reported on this many of its segments


@dataclass
class WindowResult:
    """What became of a window; losses are reconstruction losses with hard rounding.

    Args:
        start: first block.
        stop: one past the last block.
        rec_loss_first: before the window was solved.
        rec_loss_last: after.
        rec_loss_rtn: rounded to nearest, each weight's range covered whole.
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


@torch.no_grad()
def measure(window: Window, cache: ActivationCache, targets: Stream, loss: ReconstructionLoss) -> float:
    """Return the window's reconstruction loss over the first `MEASURED_SEGMENTS` segments, in its present state."""
    total, count = 0.0, 0
    for part in cache.parts(min(len(cache), MEASURED_SEGMENTS)):
        batch, target = cache.quantized[part], targets[part]
        with autocast(batch.device):
            total += loss(target, cache.run_blocks(window.start, window.stop, batch))[0].item() * len(batch)
        count += len(batch)
    return total / count
