"""What the machine has to compute with."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

GIB = 2**30
PROCESS = psutil.Process()


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them. CUDA is not started."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name for name in named.split(",") if name]


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use only algorithms that give the same bits every time inside, if that is wanted.

    Note: a CPU does so anyway. On a GPU some sums come out in another order each time; cuBLAS must know before its
        first product.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def memory_now_gib(device: torch.device) -> dict[str, float]:
    """Return what this process holds now, in GiB: `memory/host`, and `memory/device` on a GPU, which is not waited for.

    Args:
        device: that it computes on.
    """
    found = {"memory/host": PROCESS.memory_info().rss / GIB}
    if device.type == "cuda":
        found["memory/device"] = torch.cuda.memory_allocated(device) / GIB
    return found
