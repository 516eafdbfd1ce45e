"""Timing: interleaved repeats within one process, waited for on the device."""

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Sample = TypeVar("Sample")


def now(device: torch.device) -> float:
    """Return the time in seconds at which all work given to `device` so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(actions: list[Callable[[], Sample]], repeats: int) -> list[list[Sample]]:
    """Return what each action measures of itself, one value a repeat, in the order A B C A B C ...

    What slows the machine for a while then slows all of them. Everything runs once before, uncounted. The garbage
    collector runs between the actions and never inside one; what was there before is out of its way.

    Example:
        >>> counter = iter(range(100))
        >>> interleave([lambda: next(counter), lambda: next(counter)], repeats=2)
        [[2, 4], [3, 5]]
    """
    samples: list[list[Sample]] = [[] for _ in actions]
    was_enabled = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        for repeat in range(-1, repeats):
            for action, taken in zip(actions, samples, strict=True):
                gc.collect()
                sample = action()
                if repeat >= 0:
                    taken.append(sample)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return samples


def ratios(above: list[float], below: list[float]) -> tuple[float, ...]:
    """Return the ratio of each repeat."""
    return tuple(a / b for a, b in zip(above, below, strict=True))
