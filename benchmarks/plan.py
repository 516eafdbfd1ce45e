"""What a run of the benchmarks measures, and how often."""

from dataclasses import dataclass

import torch

from benchmarks.shapes import Size


@dataclass(frozen=True)
class Plan:
    """The options that every part reads.

    Args:
        sizes: of the blocks.
        repeats: interleaved repeats a ratio.
        device: where to measure.
        quick: shrink what has no size, so that all of it takes seconds and measures nothing.
    """

    sizes: tuple[Size, ...]
    repeats: int
    device: torch.device
    quick: bool

    @property
    def shortest_seconds(self) -> float:
        """A sample takes at least this long: calls of microseconds are repeated within it."""
        return 0.0 if self.quick else 0.1
