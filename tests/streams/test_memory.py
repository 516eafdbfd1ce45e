"""Free memory, as made-up systems tell it."""

import shutil
from pathlib import Path

import pytest
import torch

from cbq.streams.memory import free_device_bytes, free_disk_bytes, free_host_bytes

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"


def system(root: Path, **files: str) -> Path:
    """Write what a system says of itself."""
    names = {"meminfo": "proc/meminfo", "cgroup": "proc/self/cgroup"}
    for name, text in files.items():
        path = root / names.get(name, f"sys/fs/cgroup/job/memory.{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 600 * 1024),
        ({"max": "max\n", "current": "5\n", "stat": "inactive_file 0\n"}, 600 * 1024),
        ({"max": "100000\n", "current": "30000\n", "stat": "file 5\ninactive_file 10000\n"}, 80000),
        ({"max": "9000000\n", "current": "0\n", "stat": "inactive_file 0\n"}, 600 * 1024),
        ({"max": "100\n", "current": "300\n", "stat": "inactive_file 0\n"}, 0),
    ],
    ids=["no group", "no limit", "limit", "limit above the machine's", "more than the limit"],
)
def test_free_host_memory(tmp_path, group, free):
    """The machine's, or what a container leaves of it: files that can be dropped do not count."""
    assert free_host_bytes(system(tmp_path, meminfo=MEMINFO, cgroup="3:cpu:/x\n0::/job\n", **group)) == free


def test_a_system_that_says_nothing(tmp_path):
    assert free_host_bytes(tmp_path) > 2**28, "all of the memory"


def test_here(tmp_path):
    assert 0 < free_host_bytes() <= free_host_bytes(tmp_path)
    assert free_device_bytes(torch.device("cpu")) == pytest.approx(free_host_bytes(), rel=0.2)
    expected = shutil.disk_usage(tmp_path).free
    for folder in (tmp_path, tmp_path / "not" / "made" / "yet"):
        assert free_disk_bytes(folder) == pytest.approx(expected, rel=0.05)
