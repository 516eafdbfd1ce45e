"""What every way to solve a window has in common: who solves one, and what is said of it."""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn

from cbq.activations import ActivationCache, autocast
from cbq.quant.linear import QuantLinear, quant_linears
from cbq.quant.rounding import Rounding
from cbq.quant.state import QuantState, quant_state, quantized_modules
from cbq.quant.step_size import StepSize
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.result import WindowResult, window_blocks
from cbq.reconstruction.windows import Window
from cbq.streams.kinds import Stream

MEASURED_SEGMENTS = 16  # what a window's loss is reported on, and what the guard goes by


@dataclass(frozen=True)
class Task:
    """A window that is prepared, and how well it does before it is learned.

    Args:
        window: which blocks; all their linears are in the learned state.
        cache: its quantized stream is at window.start.
        targets: the full-precision stream after the window, (N, T, D).
        new: the modules that start anew: no window has learned them yet, or they are learned once more.
        first: the reconstruction loss as it stands.
        nearest: the same rounded to nearest, each weight's range covered whole.
    """

    window: Window
    cache: ActivationCache
    targets: Stream
    new: set[nn.Module]
    first: float
    nearest: float


class WindowSolver(ABC):
    """Solves windows one at a time.

    Args:
        loss: Eq. 7, by which a window is measured.

    Attributes:
        num_streams: of hidden states that are kept at one time.
        learns_act_scale: whether it learns S_X.
    """

    num_streams = 2
    learns_act_scale = False

    def __init__(self, loss: ReconstructionLoss) -> None:
        self.loss = loss

    def check(self, blocks: nn.ModuleList) -> None:
        """Refuse blocks that no window could be solved with, before any work is done: by default none.

        Args:
            blocks: made quantizable.

        Raises:
            InputError: see the class.
        """
        return

    def steps(self, num_segments: int) -> int:
        """Return how many optimizer steps of a window callbacks hear of, for N calibration segments."""
        return 0

    def solve(self, window: Window, cache: ActivationCache, callbacks: list[L.Callback]) -> WindowResult:
        """Solve a window; its roundings end hard, its linears in the learned state.

        Args:
            window: which blocks.
            cache: its quantized stream must be at window.start, and its full-precision one not past window.stop.
            callbacks: listeners of the fit, where there is one.
        """
        began = time.perf_counter()
        assert cache.quantized_at == window.start, "the quantized stream is the window's input"
        targets = cache.advance_full_precision(window.stop)
        blocks = window_blocks(window, cache)
        new = self.prepare_(window, cache)
        first = self.measure(window, cache, targets)
        with quant_state(blocks, QuantState.NEAREST):
            nearest = self.measure(window, cache, targets)
        last, guard = self.learn_(Task(window, cache, targets, new, first, nearest), callbacks)
        changed, total = map(sum, zip(*(linear.changed_integers() for linear in quant_linears(blocks)), strict=True))
        return WindowResult(
            start=window.start,
            stop=window.stop,
            rec_loss_first=first,
            rec_loss_last=last,
            rec_loss_rtn=nearest,
            changed_integers=changed / max(total, 1),
            wall_time_seconds=time.perf_counter() - began,
            guard=guard,
        )

    @torch.no_grad()
    def measure(self, window: Window, cache: ActivationCache, targets: Stream) -> float:
        """Return a window's reconstruction loss over the first `MEASURED_SEGMENTS` segments, in its present state."""
        total, count = 0.0, 0
        for part in cache.parts(min(len(cache), MEASURED_SEGMENTS)):
            batch, target = cache.quantized[part], targets[part]
            with autocast(batch.device):
                total += self.loss(target, cache.run_blocks(window.start, window.stop, batch))[0].item() * len(batch)
            count += len(batch)
        return total / count

    def prepare_(self, window: Window, cache: ActivationCache) -> set[nn.Module]:
        """Put all of a window into the learned state.

        Returns:
            the modules that were not in it before.
        """
        modules = quantized_modules(window_blocks(window, cache))
        new = {module for module in modules if module.state is not QuantState.LEARNED}
        for module in modules:
            module.state = QuantState.LEARNED
        return new

    def roundings(self, linear: QuantLinear) -> list[Rounding]:
        """Return one of each kind of rounding that this solver gives a linear, besides those that it is given ready."""
        return []

    def step_sizes(self, linear: QuantLinear) -> list[StepSize]:
        """Return one of each kind of step size that this solver gives a linear's weight, besides the multiplier."""
        return []

    @abstractmethod
    def learn_(self, task: Task, callbacks: list[L.Callback]) -> tuple[float, str | None]:
        """Learn a window that is prepared.

        Returns:
            the reconstruction loss at the end; what the guard did, or None.
        """
