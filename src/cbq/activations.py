"""The hidden states that blocks pass on: the full-precision and the quantized stream of the calibration segments.

Shapes: N segments, B batch, T tokens, D hidden.
"""

from dataclasses import dataclass

import torch
from torch import nn


class _StopForward(Exception):
    """Ends a forward pass once the wanted block's input is captured."""


@dataclass
class BlockCall:
    """What the model passes to one block besides the hidden states.

    Captured for every block, since masks and rotary embeddings differ by block in some families.
    """

    args: tuple
    kwargs: dict


def capture_block_calls(model: nn.Module, blocks: nn.ModuleList, segment: torch.Tensor) -> list[BlockCall]:
    """Return each block's call in a forward pass of one `segment`, (1, T) token ids."""
    calls: list[BlockCall] = []

    def remember(block: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append(BlockCall(args[1:], kwargs))

    hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad():
            model(input_ids=segment, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == len(blocks), "every block is called once, in order"
    return calls


def capture_first_inputs(model: nn.Module, block: nn.Module, segments: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Return the hidden states (N, T, D) that the model passes to its first `block` for token ids (N, T)."""
    captured: list[torch.Tensor] = []

    def stop(block: nn.Module, args: tuple, kwargs: dict) -> None:
        captured.append(args[0] if args else kwargs["hidden_states"])
        raise _StopForward

    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in segments.split(batch_size):
                try:
                    model(input_ids=batch, use_cache=False)
                except _StopForward:
                    continue
    finally:
        hook.remove()
    return torch.cat(captured)


class ActivationCache:
    """Both streams, and how to run blocks on them.

    The quantized stream is the input of block `quantized_at`: all earlier blocks are quantized and finished. The
    full-precision stream runs ahead of it, at block `full_precision_at`: the targets of a window are its state after
    the window's last block. Neither is ever recomputed from block 0.

    Args:
        model: the language model; its blocks must be in the full-precision state.
        blocks: the model's blocks.
        segments: token ids, (N, T).
        batch_size: segments a forward pass where no gradient is needed.

    Attributes:
        full_precision: (N, T, D).
        quantized: (N, T, D).
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, batch_size: int = 8) -> None:
        segments = segments.to(next(model.parameters()).device)
        self.blocks = blocks
        self.batch_size = batch_size
        self.calls = capture_block_calls(model, blocks, segments[:1])
        self.full_precision = capture_first_inputs(model, blocks[0], segments, batch_size)
        self.quantized = self.full_precision
        self.full_precision_at = 0
        self.quantized_at = 0

    def __len__(self) -> int:
        return len(self.full_precision)

    def run_blocks(self, start: int, stop: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output (B, T, D) of blocks start to stop - 1 for the input `hidden` (B, T, D)."""
        for block, call in zip(self.blocks[start:stop], self.calls[start:stop], strict=True):
            output = block(hidden, *call.args, **call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def map_stream(self, start: int, stop: int, stream: torch.Tensor) -> torch.Tensor:
        """Return what blocks start to stop - 1 make of a whole `stream` (N, T, D), with no gradient."""
        if start == stop:
            return stream
        output = torch.empty_like(stream)
        for batch, place in zip(stream.split(self.batch_size), output.split(self.batch_size), strict=True):
            with autocast(batch.device):
                place.copy_(self.run_blocks(start, stop, batch))
        return output

    def advance_full_precision(self, stop: int) -> torch.Tensor:
        """Move the full-precision stream on to the input of block `stop`, and return it: a window's targets."""
        assert stop >= self.full_precision_at, "the full-precision stream only moves forward"
        self.full_precision = self.map_stream(self.full_precision_at, stop, self.full_precision)
        self.full_precision_at = stop
        return self.full_precision

    def advance_quantized(self, stop: int) -> torch.Tensor:
        """Move the quantized stream on to the input of block `stop`, through blocks that are finished."""
        assert stop >= self.quantized_at, "the quantized stream only moves forward"
        self.quantized = self.map_stream(self.quantized_at, stop, self.quantized)
        self.quantized_at = stop
        return self.quantized


def autocast(device: torch.device) -> torch.autocast:
    """Return the context of every forward pass: bfloat16 matrix products on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
