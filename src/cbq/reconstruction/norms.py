"""Gains of norms that are learned with a window: they stay in full precision, and cost nothing to run.

Shapes: D hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from cbq.quant.state import Quantized


class LearnedGain(nn.Module):
    """A gain (D,) times what is learned, which starts at 1.

    Args:
        gain: the norm's weight before learning; only its shape and its device count.
        offset: the norm multiplies by this plus its weight.

    Source: Li et al. (2023), Norm Tweaking, arXiv 2309.02784, which learns the gain itself: as a factor one learning
        rate means the same for every model.
    Note: a gain of 0 stays 0.
    """

    def __init__(self, gain: torch.Tensor, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.multiplier = nn.Parameter(torch.ones_like(gain, dtype=torch.float32))

    def forward(self, gain: torch.Tensor) -> torch.Tensor:
        """Return the learned weight for the one before learning."""
        return ((gain.float() + self.offset) * self.multiplier - self.offset).to(gain.dtype)


def norms(blocks: list[nn.Module]) -> list[nn.Module]:
    """Return what has a gain, in order: a weight of one dimension in a module that is not quantized."""
    owned = {
        child
        for block in blocks
        for module in block.modules()
        if isinstance(module, Quantized)
        for child in module.modules()
    }
    modules = [module for block in blocks for module in block.modules() if module not in owned]
    return [m for m in modules if isinstance(getattr(m, "weight", None), torch.Tensor) and m.weight.dim() == 1]


@contextmanager
def learned_gains(blocks: list[nn.Module], wanted: bool, offset: float = 0.0) -> Iterator[list[LearnedGain]]:
    """Let the gains of the blocks' norms be learned inside; at the end each norm keeps what was learned.

    After an error they are what they were.

    Args:
        blocks: of the window.
        wanted: otherwise there are none.
        offset: their norms multiply by this plus their weight.
    """
    tuned = norms(blocks) if wanted else []
    gains = [LearnedGain(norm.weight, offset) for norm in tuned]
    finished = False
    try:
        for norm, gain in zip(tuned, gains, strict=True):
            parametrize.register_parametrization(norm, "weight", gain)
        yield gains
        finished = True
    finally:
        for norm in filter(parametrize.is_parametrized, tuned):
            parametrize.remove_parametrizations(norm, "weight", leave_parametrized=finished)
            norm.weight.requires_grad_(False)
