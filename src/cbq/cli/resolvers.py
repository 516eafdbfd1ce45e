"""What `conf/` computes: `${name:argument}` calls the function of that name."""

import getpass
import hashlib
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from cbq.devices import num_cores, visible_gpus

MAX_FOLDER_BYTES = 200
MAX_SWEEP_NAME = 100  # W&B's groups, which are named by it, have at most 128
HELD: list[FileLock] = []


def folder_name(dirname: str) -> str:
    """Return a name for one folder from a sweep job's overrides: no path in it, and not too long for a disk.

    Example:
        >>> folder_name("quant=w4a4,calibration.path=../a.txt")
        'quant=w4a4,calibration.path=.._a.txt'
    """
    name = dirname.replace("/", "_").replace(chr(92), "_")
    if len(name.encode()) <= MAX_FOLDER_BYTES:
        return name
    digest = hashlib.sha256(dirname.encode()).hexdigest()[:12]
    return name.encode()[: MAX_FOLDER_BYTES - 13].decode(errors="ignore") + "-" + digest


def sweep_folder(overrides: Sequence[str], otherwise: str) -> str:
    """Return where a sweep's jobs are: one folder a table, so that cells of it are found again, else what is given.

    Args:
        overrides: the command line of a sweep, or those of one of its jobs.
        otherwise: the folder of a sweep without experiments.

    Example:
        >>> sweep_folder(["experiment=glob(table3c_*)", "model=pico"], "mine")
        'table3c'
        >>> sweep_folder(["experiment=table3c_w2_o1", "model=pico"], "mine")
        'table3c'
        >>> sweep_folder(["quant=w4a4,w2a16"], "mine")
        'mine'
    """
    found = [re.match(r"experiment=(?:glob\()?([A-Za-z0-9]+)", override) for override in overrides]
    return next((match[1] for match in found if match), otherwise)


def typed_sweep(overrides: Sequence[str], not_named: Sequence[str]) -> str:
    """Return a name for what was typed, in any order, so that the same sweep typed again finds its finished cells.

    Args:
        overrides: the command line of a sweep.
        not_named: options that do not decide what its cells are.

    Returns:
        the options, as they name the folder of a job; where they are too long or hold what a folder's name should
        not, the beginning of that and a hash of them all.

    Example:
        >>> typed_sweep(["quant=w4a4,w2a16", "cbd.window=1,2", "overwrite=true"], ["overwrite"])
        'cbd.window=1,2,quant=w4a4,w2a16'
        >>> typed_sweep(["cbd.window=range(1,4)"], [])
        'cbd.window=range_1,4_-1e61d00df16c'
    """
    named = sorted(word for word in overrides if word.partition("=")[0].lstrip("+~") not in not_named)
    text = ",".join(named) or "defaults"
    name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text)
    if name == text and len(name) <= MAX_SWEEP_NAME:
        return name
    return f"{name[: MAX_SWEEP_NAME - 13]}-{hashlib.sha256(chr(0).join(named).encode()).hexdigest()[:12]}"


def num_workers() -> int:
    """Return how many jobs this machine works on at a time: one a GPU, or one a core where there is none."""
    return len(visible_gpus()) or num_cores()


def device_of_job(number: int) -> str:
    """Return the `CUDA_VISIBLE_DEVICES` of a sweep's job: this process's GPU, or the next in turn if none is free."""
    gpus = visible_gpus()
    return own_gpu() or gpus[number % len(gpus)] if gpus else ""


@cache
def own_gpu() -> str | None:
    """Return a GPU that no other process of a sweep works on, for as long as this process lives, or None."""
    for gpu in visible_gpus():
        name = re.sub(r"\W", "_", f"cbq-{getpass.getuser()}-gpu-{gpu}")
        lock = FileLock(Path(tempfile.gettempdir()) / f"{name}.lock")
        with suppress(Timeout):
            lock.acquire(timeout=0)
            HELD.append(lock)
            return gpu
    return None


def register() -> None:
    """Make the functions known to omegaconf, in this process."""
    for resolver in (folder_name, sweep_folder, num_workers, device_of_job):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    # Hydra hands the cache of a sweep to its jobs: they see the name of the sweep's command line, not of their own.
    OmegaConf.register_new_resolver(typed_sweep.__name__, typed_sweep, replace=True, use_cache=True)
