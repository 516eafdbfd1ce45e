"""The loop over a model's windows."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import lightning as L
import torch
from torch import nn

from cbq.activations import ActivationCache
from cbq.models.offload import moved
from cbq.quant.linear import fuse_linears_
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.window_solver import WindowSolver
from cbq.reconstruction.windows import Window
from cbq.streams.places import ON_DEVICE, Place


class Journal(Protocol):
    """What keeps how far the windows are."""

    def recall_(self, cache: ActivationCache) -> list[WindowResult]:
        """Bring the cache and its blocks to where an earlier loop was, and return what became of its windows."""

    def keep(self, cache: ActivationCache, window: Window, results: list[WindowResult]) -> None:
        """Write down that a window is solved, its finished blocks are fused, and both streams are moved on."""


class NoJournal:
    """Keeps nothing."""

    def recall_(self, cache: ActivationCache) -> list[WindowResult]:
        return []

    def keep(self, cache: ActivationCache, window: Window, results: list[WindowResult]) -> None:
        pass


NO_JOURNAL = NoJournal()


def reconstruct_(
    model: nn.Module,
    blocks: nn.ModuleList,
    segments: torch.Tensor,
    plan: list[Window],
    solver: WindowSolver,
    callbacks: list[L.Callback],
    on_window: Callable[[WindowResult], None],
    place: Place = ON_DEVICE,
    journal: Journal = NO_JOURNAL,
) -> list[WindowResult]:
    """Solve every window, handing the quantized stream from one to the next; the blocks end fused.

    Args:
        model: the language model, its block linears in the full-precision state.
        blocks: its blocks.
        segments: calibration token ids, (N, T).
        plan: windows that cover the blocks, in order.
        solver: how a window is solved.
        callbacks: listeners of every fit.
        on_window: told of each finished window.
        place: where streams are kept.
        journal: keeps how far the windows are; the loop goes on from there.

    Source: Figure 2.
    """
    cache = ActivationCache(model, blocks, segments, place=place)
    results = journal.recall_(cache)
    with older_objects_left_alone():
        for window in plan[len(results) :]:
            with moved(blocks[window.start : window.stop]):
                results.append(solver.solve(window, cache, callbacks))
                on_window(results[-1])
                for block in blocks[window.start : window.finished]:
                    fuse_linears_(block)
                cache.advance_quantized(window.finished)
            journal.keep(cache, window, results)
            gc.collect()  # a trainer and its module hold each other, and the window's streams
    return results


@contextmanager
def older_objects_left_alone() -> Iterator[None]:
    """Let the garbage collector look only at what is made inside: of a whole process it takes half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
