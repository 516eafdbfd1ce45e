"""python -m benchmarks.probe WORK: solve one window in this fresh process and print the memory that it took, as JSON.

loaded_bytes: once the model and its streams were there; peak_bytes: the most; both above what the process had before.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.memory import GIB, Work
from benchmarks.shapes import ROUNDINGS, SIZES, default_device, random_model, random_segments
from cbq.activations import ActivationCache
from cbq.cost import peak_device_memory_gib, peak_host_memory_gib, reset_peak_device_memory
from cbq.models.families import get_blocks
from cbq.quant.linear import quantize_linears_
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.windows import SlidingWindows


def main(argument: str) -> None:
    """Print what the work that `argument` names takes."""
    work, device = Work.from_json(argument), default_device()
    # What is imported, compiled or allocated once is not the window's.
    solve_first_window(replace(work, size=SIZES["tiny"], tokens=8, segments=3, blocks=2, window=2, overlap=0), device)
    gc.collect()
    before = peak_from_here(device)
    loaded, peak = solve_first_window(work, device)
    print(json.dumps({"loaded_bytes": (loaded - before) * GIB, "peak_bytes": (peak - before) * GIB}))


def solve_first_window(work: Work, device: torch.device) -> tuple[float, float]:
    """Return the peak in GiB before the window was solved, and after."""
    model = random_model(work.size, work.blocks, work.tokens, device)
    blocks = get_blocks(model)
    quantize_linears_(blocks, QuantScheme.parse(work.scheme))
    cache = ActivationCache(model, blocks, random_segments(work.segments, work.tokens))
    window = SlidingWindows(work.window, work.overlap).plan(work.blocks)[0]
    solver = Reconstruction(ReconstructionLoss(), ROUNDINGS[work.rounding], LearningRates(), epochs=work.epochs)
    loaded = peak_from_here(device)
    solver.solve(window, cache, [])
    return loaded, peak_memory_gib(device)


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak of the device that is the scarce one: the GPU if there is one."""
    peak = peak_device_memory_gib(device)
    return peak_host_memory_gib() if peak is None else peak


def peak_from_here(device: torch.device) -> float:
    """Forget the peak so far, where that can be done, and return the new one: what is in use now."""
    reset_peak_device_memory(device)
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # Linux: VmHWM starts again at the present resident memory
    return peak_memory_gib(device)


if __name__ == "__main__":
    main(sys.argv[1])
