"""Where streams are kept: on the device, in host memory or on disk, with the same bits in all; and how to choose.

Shapes: N segments, T tokens, D hidden.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from cbq.errors import InputError, check_number, check_text
from cbq.streams.kinds import DiskStream, HostStream, Prefetch, Stream
from cbq.streams.memory import GIB, free_device_bytes, free_disk_bytes, free_host_bytes


class Place:
    """Somewhere to keep streams: by default, in the memory of the device that works on them.

    Attributes:
        name: what a user calls it.
    """

    name = "device"

    def room(self, device: torch.device) -> int:
        """Return how many bytes are free here, beside `device`."""
        return free_device_bytes(device)

    def taken(self, num_bytes: int, device: torch.device) -> int:
        """Return how many bytes a stream of `num_bytes` takes here."""
        return num_bytes

    def make(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Stream:
        """Return a stream (N, T, D) to be filled, whose batches are worked on on `device`."""
        return Stream(torch.empty(shape, dtype=dtype, device=device), device)

    def feed(self, batches: Iterable[list[torch.Tensor]], device: torch.device) -> Iterable[list[torch.Tensor]]:
        """Return batches of streams that are kept here, the next one prefetched where that helps."""
        return batches


class OnHost(Place):
    """In host memory; beside a GPU page-locked, with the next batch prefetched."""

    name = "host"

    def room(self, device: torch.device) -> int:
        return free_host_bytes()

    def taken(self, num_bytes: int, device: torch.device) -> int:
        # torch rounds page-locked memory up to a power of two.
        return 1 << (num_bytes - 1).bit_length() if device.type == "cuda" else num_bytes

    def make(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Stream:
        return HostStream(torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda"), device)

    def feed(self, batches: Iterable[list[torch.Tensor]], device: torch.device) -> Iterable[list[torch.Tensor]]:
        return Prefetch(batches, device)


class OnDisk(Place):
    """In memory-mapped files, one a stream.

    The files have no name: they are gone when their streams are, and when the process ends, however it ends.

    Args:
        folder: where; made before the first stream is.
    """

    name = "disk"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def room(self, device: torch.device) -> int:
        return free_disk_bytes(self.folder)

    def make(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Stream:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                reserve(file.fileno(), num_bytes)
                pages = mmap.mmap(file.fileno(), num_bytes)  # keeps the file for itself
        except OSError as error:
            raise InputError(f"activations.cache=disk: {num_bytes} bytes in {self.folder}: {error.strerror}") from error
        return DiskStream(torch.frombuffer(pages, dtype=dtype).view(shape), device, pages)


def reserve(file: int, num_bytes: int) -> None:
    """Give an empty file its size and its blocks on the disk: a page without one could not be written, and would
    end the process.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, num_bytes)
        return
    while num_bytes:
        num_bytes -= os.write(file, bytes(min(num_bytes, 2**20)))


ON_DEVICE = Place()
CACHES = {
    "auto": ("device", "host", "disk"),
    "device": ("device",),
    "host": ("host",),
    "disk": ("disk",),
}


class StreamPlacement:
    """Chooses where the streams of a run are kept.

    Args:
        cache: device, host, disk, or auto: the first of them that has room.
        device_share: auto: of the device's free memory, how much streams may take; windows need the rest.
        host_share: auto: likewise of the free host memory.
        folder: of the files of `disk`; the run's own where there is None.

    Raises:
        InputError: a value is out of range.
    """

    def __init__(
        self, cache: str = "auto", device_share: float = 0.25, host_share: float = 0.5, folder: str | None = None
    ) -> None:
        if cache not in tuple(CACHES):
            raise InputError(f"activations.cache must be one of {', '.join(CACHES)}, got {cache!r}")
        for key, share in {"device_share": device_share, "host_share": host_share}.items():
            check_number(f"activations.{key}", share)
            if share > 1:
                raise InputError(f"activations.{key} must be at most 1, got {share!r}")
        check_text("activations.folder", folder, optional=True)
        if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK)):
            raise InputError(f"activations.folder must be a folder to write in, got {folder!r}")
        self.cache = cache
        self.shares = {"device": device_share, "host": host_share, "disk": 1.0}
        self.folder = folder

    def choose(self, num_streams: int, num_bytes: int, device: torch.device, run_folder: Path) -> Place:
        """Return where a run keeps its streams.

        Args:
            num_streams: held at one time.
            num_bytes: of each.
            device: where blocks run; what else it has to hold for good is there already.
            run_folder: the run's folder, which need not exist yet.

        Raises:
            InputError: there is too little room.
        """
        places = (ON_DEVICE, OnHost(), OnDisk(Path(self.folder or run_folder)))
        *rest, last = (place for place in places if place.name in CACHES[self.cache])
        for place in rest:
            if num_streams * place.taken(num_bytes, device) <= self.shares[place.name] * place.room(device):
                return place
        needed, room = num_streams * last.taken(num_bytes, device), last.room(device)
        if needed > room:
            raise InputError(
                f"activations.cache={self.cache}: {num_streams} streams take {needed / GIB:.3g} GiB of {last.name}, "
                f"and {room / GIB:.3g} GiB are free: choose another, or fewer or shorter calibration segments"
            )
        return last
