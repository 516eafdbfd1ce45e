import subprocess
import sys

import pytest
import torch

from cbq.cost import Stopwatch, format_duration, peak_device_memory_gib, peak_host_memory_gib

SCRIPT = """
from cbq.cost import peak_host_memory_gib
before = peak_host_memory_gib()
block = bytearray(b"x") * (256 * 2**20)
del block
print(before, peak_host_memory_gib())
"""


def test_peak_host_memory_is_in_gib_and_of_this_process_alone():
    block = bytearray(b"x") * (768 * 2**20)  # a big parent must not show in a small child
    process = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, after = map(float, process.stdout.split())
    assert peak_host_memory_gib() > 0.8
    assert len(block) == 768 * 2**20
    assert 0.02 < before < 0.7  # a Python with torch
    # A quarter of a GiB more, less what the peak of importing torch had already freed.
    assert 0.1 < after - before < 0.3


def test_peak_device_memory_is_unknown_on_a_cpu():
    assert peak_device_memory_gib("cpu") is None
    assert peak_device_memory_gib(torch.device("cpu")) is None


def test_stopwatch_adds_up(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0, 21.0, 30.0])
    monkeypatch.setattr("cbq.cost.time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch()
    with stopwatch.phase("evaluation"):
        pass
    with pytest.raises(KeyError), stopwatch.phase("evaluation"):
        raise KeyError
    with stopwatch.phase("reconstruction"):
        pass
    assert stopwatch.seconds == {"evaluation": 6.0, "reconstruction": 1.0}
    assert stopwatch.total_seconds() == 30.0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599.7, "1:00:00"), (360000, "100:00:00")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
