"""Which blocks are learned together, and in which order (paper section 3.1)."""

from collections.abc import Callable
from dataclasses import dataclass

from cbq.errors import InputError


@dataclass(frozen=True)
class Window:
    """Blocks start to stop - 1, reconstructed together.

    Args:
        start: first block.
        stop: one past the last block.
        rounding_start: the rounding of blocks rounding_start to stop - 1 is learned; step sizes of all.
        finished: blocks start to finished - 1 are in no later window: they are finished when this one is solved.
    """

    start: int
    stop: int
    rounding_start: int
    finished: int

    def __len__(self) -> int:
        return self.stop - self.start


def whole_window(start: int, stop: int, overlap: int) -> int:
    """Return the first block whose rounding a window learns: its first (default; the paper's memory figures say so)."""
    return start


def overlap_only(start: int, stop: int, overlap: int) -> int:
    """Return the first block whose rounding a window learns: its last `overlap` ones.

    Source: Eq. 10 read literally, j = k + 1 - overlap.
    Note: blocks before the first overlap never get a learned rounding.
    """
    return max(start, stop - overlap)


ROUNDING_BLOCKS: dict[str, Callable[[int, int, int], int]] = {"window": whole_window, "overlap": overlap_only}


class SlidingWindows:
    """The sequence of windows over a model's blocks.

    Args:
        window: blocks a window, at least 1.
        overlap: blocks that a window shares with the one before it, 0 to window - 1; None is min(1, window - 1).
        rounding_blocks: `window` or `overlap`, whose rounding is learned; see the functions above.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> [(w.start, w.stop) for w in SlidingWindows(window=2, overlap=1).plan(4)]
        [(0, 2), (1, 3), (2, 4)]
        >>> [(w.start, w.stop) for w in SlidingWindows(window=3, overlap=0).plan(4)]
        [(0, 3), (3, 4)]

    Source: section 3.1.
    """

    def __init__(self, window: int, overlap: int | None = None, rounding_blocks: str = "window") -> None:
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InputError(f"cbd.window must be an integer of at least 1, got {window!r}")
        overlap = min(1, window - 1) if overlap is None else overlap
        if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap < window:
            raise InputError(f"cbd.overlap must be 0 to {window - 1} (below cbd.window={window}), got {overlap!r}")
        if rounding_blocks not in ROUNDING_BLOCKS:
            raise InputError(
                f"cbd.rounding_blocks must be one of {', '.join(ROUNDING_BLOCKS)}, got {rounding_blocks!r}"
            )
        if rounding_blocks == "overlap" and overlap == 0:
            raise InputError("cbd.rounding_blocks=overlap needs cbd.overlap of at least 1: it would learn no rounding")
        self.window = window
        self.overlap = overlap
        self.rounding_start = ROUNDING_BLOCKS[rounding_blocks]

    def plan(self, num_blocks: int) -> list[Window]:
        """Return the windows of a model of `num_blocks` blocks.

        Windows start every window - overlap blocks; the last one is shortened to end at the last block.

        Raises:
            InputError: the window is larger than the model.
        """
        if self.window > num_blocks:
            raise InputError(f"cbd.window must be at most the model's {num_blocks} blocks, got {self.window}")
        stride = self.window - self.overlap
        last_start = -(-(num_blocks - self.window) // stride) * stride
        windows = []
        for start in range(0, last_start + 1, stride):
            stop = min(start + self.window, num_blocks)
            finished = stop if stop == num_blocks else start + stride
            windows.append(Window(start, stop, self.rounding_start(start, stop, self.overlap), finished))
        return windows
