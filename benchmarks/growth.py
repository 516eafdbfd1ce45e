"""How time and memory grow: exponents fitted over a few sizes of one thing, all else kept.

Time is that of `cbq.quantize` on a small random-weight model. It should be linear in blocks, segments, tokens, epochs
and windows; what an exponent lacks to 1 is work that does not grow: for epochs targets and measuring, for the tokens of
a segment the fake-quantization of the weights, for the width everything but the matrix products. Memory is the peak
above the loaded model: it grows with the window and not with the model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

import cbq
from benchmarks.clock import interleave, now
from benchmarks.memory import Work, probe
from benchmarks.plan import Plan
from benchmarks.rows import Row
from benchmarks.shapes import ROUNDINGS, SIZES, Size, random_model, random_segments
from cbq.reconstruction.windows import SlidingWindows

BASE = Work(SIZES["pico"], "w4a4", "lora_ste", segments=8, tokens=128, blocks=4)
QUICK_BASE = Work(SIZES["tiny"], "w4a4", "lora_ste", segments=2, tokens=8, blocks=2, window=1)
MEMORY_BASE = replace(BASE, segments=2, tokens=512, blocks=8)


@dataclass(frozen=True)
class Axis:
    """What grows.

    Args:
        name: in words.
        points: the work, from small to large.
        sizes: how large the thing is in each.
        expected: the exponent that theory says.
    """

    name: str
    points: tuple[Work, ...]
    sizes: tuple[float, ...]
    expected: float


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return p of the cost ~ size^p that fits best: least squares of the logarithms.

    Example:
        >>> round(fit_exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    slope, _ = np.polyfit(np.log(sizes), np.log(costs), 1)
    return float(slope)


def measure(plan: Plan) -> Iterator[Row]:
    """Yield a row an axis: those of time, then those of memory."""
    for axis in quick_time_axes() if plan.quick else time_axes():
        actions = [quantize_seconds(work, plan.device) for work in axis.points]
        repeats = zip(*interleave(actions, plan.repeats), strict=True)  # of each repeat, the costs of all points
        yield row(f"time by {axis.name}", axis, tuple(fit_exponent(axis.sizes, costs) for costs in repeats))
    if not plan.quick:
        for axis in memory_axes():
            peaks = [max(1.0, peak["peak_bytes"] - peak["loaded_bytes"]) for peak in map(probe, axis.points)]
            yield row(f"memory by {axis.name}", axis, (fit_exponent(axis.sizes, peaks),))


def row(name: str, axis: Axis, exponents: tuple[float, ...]) -> Row:
    """Return the row of an axis."""
    case = ", ".join(f"{size:g}" for size in axis.sizes)
    return Row("growth", name, case, exponents, "exponent", axis.expected)


def quantize_seconds(work: Work, device: torch.device) -> Callable[[], float]:
    """Return an action that quantizes a fresh model and measures how long that takes."""

    def action() -> float:
        model = random_model(work.size, work.blocks, work.tokens, device)
        segments = random_segments(work.segments, work.tokens).to(device)
        began = now(device)
        cbq.quantize(
            model,
            segments,
            work.scheme,
            work.window,
            work.overlap,
            ROUNDINGS[work.rounding],
            epochs=work.epochs,
            progress=False,
        )
        return now(device) - began

    return action


def axis(name: str, base: Work, field: str, values: tuple[int, ...], expected: float) -> Axis:
    """Return the axis along one field of the work."""
    return Axis(name, tuple(replace(base, **{field: value}) for value in values), values, expected)


def time_axes() -> list[Axis]:
    """Return what time is fitted over."""
    wide = replace(BASE, blocks=8)
    overlaps = tuple(replace(wide, window=4, overlap=overlap) for overlap in (0, 2, 3))
    num_windows = tuple(len(SlidingWindows(work.window, work.overlap).plan(work.blocks)) for work in overlaps)
    widths = (128, 256, 512)
    return [
        axis("blocks", BASE, "blocks", (2, 4, 8), 1.0),
        axis("segments", BASE, "segments", (4, 8, 16), 1.0),
        axis("tokens a segment", BASE, "tokens", (64, 128, 256, 512), 1.0),
        axis("epochs", BASE, "epochs", (1, 2, 4), 1.0),
        axis("window, no overlap", wide, "window", (1, 2, 4, 8), 0.0),
        Axis("windows of 4, overlap 0, 2, 3", overlaps, num_windows, 1.0),
        Axis("width", tuple(replace(BASE, size=scaled(width)) for width in widths), widths, 2.0),
    ]


def quick_time_axes() -> list[Axis]:
    """Return two points of one axis, which say nothing."""
    return [axis("blocks", QUICK_BASE, "blocks", (1, 2), 1.0)]


def memory_axes() -> list[Axis]:
    """Return what memory is fitted over."""
    return [
        axis("window", MEMORY_BASE, "window", (1, 2, 4), 1.0),
        axis("blocks", MEMORY_BASE, "blocks", (4, 8, 16), 0.0),
    ]


def scaled(width: int) -> Size:
    """Return pico's shape at another width; heads keep their 64 channels."""
    pico = SIZES["pico"]
    factor = width / pico.hidden
    return replace(
        pico,
        hidden=width,
        intermediate=int(pico.intermediate * factor),
        heads=int(pico.heads * factor),
        kv_heads=int(pico.kv_heads * factor),
    )
