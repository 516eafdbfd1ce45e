"""What a run costs: seconds and peak memory."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cbq.devices import GIB


def peak_host_memory_gib() -> float:
    """Return the largest resident memory of this process so far, in GiB.

    Note:
        It belongs to the process and cannot be reset: a later job of a sweep also sees the peaks of the earlier ones.
    """
    status = Path("/proc/self/status")
    if status.exists():
        # Linux: ru_maxrss would do if it did not start at the peak of the process that launched this one.
        match = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024 / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, the BSDs count KiB.
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB


def peak_device_memory_gib(device: torch.device | str) -> float | None:
    """Return the most memory that torch held on a CUDA device since the last reset, in GiB.

    Args:
        device: Any torch device.

    Returns:
        None for a device of which torch keeps no peak.

    Example:
        >>> peak_device_memory_gib("cpu") is None
        True
    """
    if torch.device(device).type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / GIB


def peak_memory(device: torch.device | str) -> dict[str, float | None]:
    """Return the peaks of the host's and the device's memory, in GiB, as results have them."""
    return {
        "peak_host_memory_gib": peak_host_memory_gib(),
        "peak_device_memory_gib": peak_device_memory_gib(device),
    }


def reset_peak_device_memory(device: torch.device | str) -> None:
    """Start the peak of `peak_device_memory_gib` anew, so that every job of a sweep reports its own."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def format_duration(seconds: float) -> str:
    """Write a duration as minutes or hours.

    Example:
        >>> format_duration(48.2), format_duration(252), format_duration(3723)
        ('0:48', '4:12', '1:02:03')
    """
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"


class Stopwatch:
    """Adds up the wall time of named phases.

    Example:
        >>> stopwatch = Stopwatch()
        >>> with stopwatch.phase("evaluation"):
        ...     pass
        >>> with stopwatch.phase("evaluation"):  # the second time is added to the first
        ...     pass
        >>> list(stopwatch.seconds)
        ['evaluation']
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._running: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` to `seconds[name]`, also when it ends by an exception."""
        self._running[name] = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.so_far()[name]
            del self._running[name]

    def so_far(self) -> dict[str, float]:
        """Return the seconds of every phase, of those that go on too."""
        now = time.perf_counter()
        return self.seconds | {name: self.seconds.get(name, 0.0) + now - start for name, start in self._running.items()}

    def cost(self) -> dict[str, float]:
        """Return all seconds as results have them."""
        phases = {f"{name}_seconds": seconds for name, seconds in self.seconds.items()}
        return {"wall_time_seconds": self.total_seconds()} | phases

    def total_seconds(self) -> float:
        """Return the wall time since the stopwatch was made, and what it goes on from."""
        return time.perf_counter() - self._start

    def state_dict(self) -> dict[str, Any]:
        """Return what another stopwatch goes on from, of JSON's types."""
        return {"seconds": self.so_far(), "total_seconds": self.total_seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Add what another stopwatch said that this one goes on from."""
        for name, value in state["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self._start -= state["total_seconds"]
