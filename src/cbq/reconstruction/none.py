"""A window that is not learned: the other end of every ablation of reconstruction."""

import time

import lightning as L

from cbq.activations import ActivationCache
from cbq.quant.state import QuantState, quantized_modules
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.result import WindowResult, measure, window_blocks
from cbq.reconstruction.windows import Window


class NoReconstruction:
    """Solves nothing: every linear is rounded to nearest (the upper half of Table 3a)."""

    num_streams = 2

    def __init__(self, loss: ReconstructionLoss) -> None:
        self.loss = loss

    def steps(self, num_segments: int) -> int:
        """Return how many optimizer steps a window takes."""
        return 0

    def solve(self, window: Window, cache: ActivationCache, callbacks: list[L.Callback]) -> WindowResult:
        """Put the window's linears into the learned state, with nothing learned."""
        began = time.perf_counter()
        targets = cache.advance_full_precision(window.stop)
        for module in quantized_modules(window_blocks(window, cache)):
            module.state = QuantState.LEARNED
        loss = measure(window, cache, targets, self.loss)
        return WindowResult(window.start, window.stop, loss, loss, loss, 0.0, time.perf_counter() - began)
