"""A second device that a machine without an accelerator can compute with: see `box.cpp`."""

from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

BOX = torch.device("hpu", 0)


class Backend(ModuleType):
    """What torch asks of a device's module."""

    def _lazy_init(self) -> None:
        """Do nothing."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Do nothing: its random numbers are the CPU's."""


@cache
def load_box() -> ModuleType:
    """Compile the device (a minute, once a machine), and return `held_bytes`, `peak_bytes` and `reset_peak` of it.

    Raises:
        RuntimeError: there is no compiler.
    """
    torch._register_device_module("hpu", Backend("hpu"))
    return cpp_extension.load("cbq_box", [str(Path(__file__).parent / "box.cpp")], extra_cflags=["-O1"])
