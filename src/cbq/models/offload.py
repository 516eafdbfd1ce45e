"""Blocks that are kept in host memory, and are on the device only while something computes with them.

A model that is larger than its device computes there all the same: what is around the blocks (embeddings, last norm,
head) stays on the device, so that the model's device is what it always was, and each block brings itself there for its
forward. Who computes with a block otherwise, or with several again and again, holds them there.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

HOST = torch.device("cpu")


class OffloadedBlock:
    """Where one block is. It takes the place of the block's `forward`, and is the block's attribute `offloaded`.

    Args:
        block: in host memory.
        device: where it computes.

    Attributes:
        on_device: whether it is there now.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self.block = block
        self.device = device
        self.on_device = False
        self.compute = block.forward
        block.forward = self.forward
        block.offloaded = self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the block makes of its arguments, on the device."""
        with self.lent():
            return self.compute(*args, **kwargs)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Have a copy of the block on the device inside: nothing of it may change there."""
        if self.on_device:
            yield
            return
        tensors = [*self.block.parameters(), *self.block.buffers()]
        kept = [tensor.data for tensor in tensors]
        self.on_device = True
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            yield
        finally:
            for tensor, data in zip(tensors, kept, strict=True):
                tensor.data = data
            self.on_device = False

    @contextmanager
    def moved(self) -> Iterator[None]:
        """Have the block itself on the device inside, with all that is made part of it there."""
        if self.on_device:
            yield
            return
        self.on_device = True
        try:
            self.block.to(self.device)
            yield
        finally:
            self.block.to(HOST)
            self.on_device = False


def offload_(model: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
    """Bring a model to a device but for its blocks, each of which comes there when it is needed.

    Args:
        model: the language model, in host memory.
        blocks: its blocks.
        device: where the model computes from now on.
    """
    inside = {id(tensor) for tensor in (*blocks.parameters(), *blocks.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    for block in blocks:
        OffloadedBlock(block, device)


@contextmanager
def lent(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Have copies of blocks on their device inside, to compute with them again and again; nothing of them may change.

    Blocks that are not offloaded are where they are.
    """
    with ExitStack() as stack:
        for block in _offloaded(blocks):
            stack.enter_context(block.lent())
        yield


@contextmanager
def moved(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Have blocks on their device inside, to change them; blocks that are not offloaded are where they are."""
    with ExitStack() as stack:
        for block in _offloaded(blocks):
            stack.enter_context(block.moved())
        yield


def _offloaded(blocks: Iterable[nn.Module]) -> list[OffloadedBlock]:
    """Return of blocks that are offloaded what keeps them."""
    return [block.offloaded for block in blocks if hasattr(block, "offloaded")]
