"""How much room is left: on a device, in host memory, on a disk."""

import os
import re
import shutil
from pathlib import Path

import torch

GIB = 2**30


def free_device_bytes(device: torch.device) -> int:
    """Return the free memory of a device; that of the host for one that has none of its own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()


def free_host_bytes(root: Path = Path("/")) -> int:
    """Return the host memory that can still be taken, also within the limit of a container.

    Args:
        root: of the file system that says so.

    Note: where the system does not say what is available (not Linux), all of the memory counts as free.
    """
    try:
        available = re.search(r"^MemAvailable:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        available = None
    free = int(available[1]) * 1024 if available else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        (own,) = re.findall(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.MULTILINE)
        group = root / "sys/fs/cgroup" / own
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
        # What of files was read and can be dropped counts as used there.
        (files,) = re.findall(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # not in a group, or one without a limit ("max")
        return free
    return max(0, min(free, limit - used + int(files)))


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder lies on, or will lie on when it is made."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free
