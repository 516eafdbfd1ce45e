"""Streams of hidden states, by where they are kept, and batches of them.

Shapes: N segments, B batch, T tokens, D hidden.
"""

import mmap
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

Where = slice | list[int] | torch.Tensor  # segments of a stream: in a row, or by their numbers


class Stream:
    """The hidden states of all segments, (N, T, D), read and written by the batch.

    Args:
        tensor: where they are, (N, T, D).
        device: where batches are worked on.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device) -> None:
        self.tensor = tensor
        self.device = device
        self.shape = tensor.shape
        self.dtype = tensor.dtype

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, where: Where) -> torch.Tensor:
        """Return segments on the device, (B, T, D); a slice may share the stream's memory."""
        return self.tensor[where]

    def __setitem__(self, where: slice, batch: torch.Tensor) -> None:
        """Overwrite segments in a row by `batch`, (B, T, D)."""
        self.tensor[where].copy_(batch)


class HostStream(Stream):
    """A stream in host memory, page-locked beside a GPU, so that a copy to the device does not hold up the host."""

    def __getitem__(self, where: Where) -> torch.Tensor:
        if isinstance(where, slice):
            return self.tensor[where].to(self.device, non_blocking=True)
        # Segment by segment: gathered on the host they would leave page-locked memory.
        return torch.stack([self.tensor[index].to(self.device, non_blocking=True) for index in where])


class DiskStream(Stream):
    """A stream in a memory-mapped file; of its pages only those of the present batch count as this process's memory.

    Args:
        tensor: over the map, (N, T, D).
        device: where batches are worked on.
        pages: the map.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device, pages: mmap.mmap) -> None:
        super().__init__(tensor, device)
        self.pages = pages

    def __getitem__(self, where: Where) -> torch.Tensor:
        batch = self.tensor[where].to(self.device, copy=True)
        self._release()
        return batch

    def __setitem__(self, where: slice, batch: torch.Tensor) -> None:
        super().__setitem__(where, batch)
        self._release()

    def _release(self) -> None:
        """Let go of the pages; what was written to them stays in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.pages.madvise(mmap.MADV_DONTNEED)


class Segments:
    """The same segments of several streams, for a DataLoader that takes a batch as it comes (`collate_fn=list`).

    Args:
        streams: of one length.
    """

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams[0])

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        """Return a batch: of each stream (B, T, D)."""
        return [stream[indices] for stream in self.streams]


class Prefetch:
    """Batches of which the next is on its way to the device while the present one is worked on.

    Args:
        batches: makes them, each a list of tensors.
        device: where they go.

    Note: the next batch is copied on a CUDA stream of its own. On a CPU it is only asked for one batch early.
    """

    def __init__(self, batches: Iterable[list[torch.Tensor]], device: torch.device) -> None:
        self.batches = batches
        self.device = device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        batches = iter(self.batches)

        def fetch() -> list[torch.Tensor] | None:
            with torch.cuda.stream(side) if side else nullcontext():
                return next(batches, None)

        following = fetch()
        while following is not None:
            batch = following
            if side:
                present = torch.cuda.current_stream(self.device)
                present.wait_stream(side)
                for tensor in batch:
                    tensor.record_stream(present)  # its memory belongs to the side stream, which would reuse it
            following = fetch()
            yield batch
