"""The hidden states that blocks pass on: the full-precision and the quantized stream of the calibration segments.

Shapes: N segments, B batch, T tokens, D hidden.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import nn

from cbq.errors import InputError
from cbq.models.families import find_family
from cbq.models.offload import lent
from cbq.streams.kinds import Stream
from cbq.streams.places import ON_DEVICE, Place


class _StopForward(Exception):
    """Ends a forward pass once the wanted block's input is captured."""


@dataclass
class BlockCall:
    """What the model passes to one block besides the hidden states.

    Captured for every block, since masks and rotary embeddings differ by block in some families.
    """

    args: tuple
    kwargs: dict


def capture_block_calls(model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor) -> list[BlockCall]:
    """Return each block's call in a forward pass of some `segments`, (B, T) token ids."""
    calls: list[BlockCall] = []

    def remember(block: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        calls.append(BlockCall(args[1:], kwargs))
        if len(calls) == len(blocks):  # the head's logits may be larger than the model
            raise _StopForward

    hooks = [block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad(), suppress(_StopForward):
            model(input_ids=segments, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == len(blocks), "every block is called once, in order"
    return calls


def capture_first_inputs(
    model: nn.Module, block: nn.Module, segments: torch.Tensor, batch_size: int
) -> Iterator[torch.Tensor]:
    """Yield the hidden states (B, T, D) that the model passes to its first `block` for token ids (N, T), in order."""
    captured: list[torch.Tensor] = []

    def stop(block: nn.Module, args: tuple, kwargs: dict) -> None:
        captured.append(args[0] if args else kwargs["hidden_states"])
        raise _StopForward

    for batch in segments.split(batch_size):
        hook = block.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), suppress(_StopForward):
                model(input_ids=batch, use_cache=False)
        finally:
            hook.remove()
        yield captured.pop()


def stream_bytes(model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor) -> int:
    """Return how large a stream of `segments`, token ids (N, T), is."""
    segment = segments[:1].to(next(model.parameters()).device)
    return len(segments) * next(capture_first_inputs(model, blocks[0], segment, 1)).nbytes


class ActivationCache:
    """Both streams, and how to run blocks on them.

    The quantized stream is the input of block `quantized_at`: all earlier blocks are quantized and finished. The
    full-precision stream runs ahead of it, at block `full_precision_at`: the targets of a window are its state after
    the window's last block. Neither is ever recomputed from block 0; both are overwritten as they move on.

    Args:
        model: the language model; its blocks must be in the full-precision state.
        blocks: the model's blocks.
        segments: token ids, (N, T).
        batch_size: segments a forward pass where no gradient is needed.
        place: where streams are kept.

    Attributes:
        config: the model's.
        full_precision: (N, T, D).
        quantized: (N, T, D); None for who needs one stream only.
        device: the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        segments: torch.Tensor,
        batch_size: int = 8,
        place: Place = ON_DEVICE,
    ) -> None:
        self.device = next(model.parameters()).device
        segments = segments.to(self.device)
        self.config = model.config
        self.blocks = blocks
        self.batch_size = batch_size
        self.place = place
        self.calls_by_batch = find_family(model.config).calls_by_batch
        self.model = model
        self.segment = segments[:1]
        self.calls: dict[int, list[BlockCall]] = {}
        # Now, before anyone listens to what passes through the blocks.
        for part in self.parts(len(segments)) if self.calls_by_batch else []:
            self.calls_of(part.stop - part.start)
        self.calls_of(1)
        self.full_precision = self._first_stream(model, segments)
        self.quantized: Stream | None = self.full_precision  # until one of them moves on
        self.full_precision_at = 0
        self.quantized_at = 0

    def __len__(self) -> int:
        return len(self.full_precision)

    def put_back(
        self, full_precision: tuple[int, Iterable[torch.Tensor]], quantized: tuple[int, Iterable[torch.Tensor]]
    ) -> None:
        """Put both streams where those of an earlier run were.

        Args:
            full_precision: the block whose input it is, and its segments in order, in parts (B, T, D).
            quantized: likewise.

        Raises:
            RuntimeError: the parts are not the segments of this cache.
        """
        streams = (
            self.full_precision,
            self.place.make(self.full_precision.shape, self.full_precision.dtype, self.device),
        )
        for stream, (_, parts) in zip(streams, (full_precision, quantized), strict=True):
            count = 0
            for part in parts:
                if part.dtype != stream.dtype:
                    raise RuntimeError(f"a stream of {part.dtype}, not {stream.dtype}")
                stream[count : count + len(part)] = part
                count += len(part)
            if count != len(stream):
                raise RuntimeError(f"a stream of {count} segments, not {len(stream)}")
        self.full_precision, self.quantized = streams
        self.full_precision_at, self.quantized_at = full_precision[0], quantized[0]

    def _first_stream(self, model: nn.Module, segments: torch.Tensor) -> Stream:
        """Return the input of the first block."""
        stream = None
        batches = capture_first_inputs(model, self.blocks[0], segments, self.batch_size)
        for part, batch in zip(self.parts(len(segments)), batches, strict=True):
            if stream is None:
                stream = self.place.make((len(segments), *batch.shape[1:]), batch.dtype, self.device)
            stream[part] = batch
        return stream

    def parts(self, num_segments: int) -> list[slice]:
        """Return where the batches of the first `num_segments` segments are in a stream."""
        starts = range(0, num_segments, self.batch_size)
        return [slice(start, min(start + self.batch_size, num_segments)) for start in starts]

    def calls_of(self, num_segments: int) -> list[BlockCall]:
        """Return what the model passes to each block for so many segments."""
        if num_segments not in self.calls:
            segments = self.segment.expand(num_segments, -1)
            self.calls[num_segments] = capture_block_calls(self.model, self.blocks, segments)
        return self.calls[num_segments]

    def run_blocks(self, start: int, stop: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output (B, T, D) of blocks start to stop - 1 for the input `hidden` (B, T, D)."""
        calls = self.calls_of(len(hidden) if self.calls_by_batch else 1)
        for block, call in zip(self.blocks[start:stop], calls[start:stop], strict=True):
            output = block(hidden, *call.args, **call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def map_stream(
        self, start: int, stop: int, stream: Stream, output: Stream | None = None, whose: str = "the model"
    ) -> Stream:
        """Return what blocks start to stop - 1 make of a whole `stream` (N, T, D), with no gradient.

        Args:
            start: the block whose input `stream` is.
            stop: one past the last block.
            stream: is read batch by batch.
            output: is written batch by batch, and may be `stream` itself; a new one if None.
            whose: hidden states they are, for the error.

        Raises:
            InputError: one of them is not finite: whatever was learned from it would be none either.
        """
        if start == stop:
            return stream
        if output is None:
            output = self.place.make(stream.shape, stream.dtype, self.device)
        parts = self.parts(len(stream))
        batches = self.place.feed(([stream[part]] for part in parts), self.device)
        finite = torch.ones((), dtype=torch.bool, device=self.device)  # looked at once: a GPU is not waited for
        with lent(self.blocks[start:stop]):
            for part, (batch,) in zip(parts, batches, strict=True):
                with autocast(self.device):
                    hidden = self.run_blocks(start, stop, batch).to(output.dtype)
                finite &= hidden.isfinite().all()
                output[part] = hidden
        check_states(finite, whose, f"blocks {start} to {stop - 1}", output.dtype)
        return output

    def advance_full_precision(self, stop: int) -> Stream:
        """Move the full-precision stream on to the input of block `stop`, and return it: a window's targets."""
        assert stop >= self.full_precision_at, "the full-precision stream only moves forward"
        output = None if self.full_precision is self.quantized else self.full_precision
        self.full_precision = self.map_stream(self.full_precision_at, stop, self.full_precision, output)
        self.full_precision_at = stop
        return self.full_precision

    def advance_quantized(self, stop: int) -> Stream:
        """Move the quantized stream on to the input of block `stop`, through blocks that are finished."""
        assert stop >= self.quantized_at, "the quantized stream only moves forward"
        output = None if self.quantized is self.full_precision else self.quantized
        self.quantized = self.map_stream(self.quantized_at, stop, self.quantized, output, "the quantized model")
        self.quantized_at = stop
        return self.quantized


def check_states(finite: torch.Tensor, whose: str, where: str, dtype: torch.dtype) -> None:
    """Refuse hidden states that are not finite.

    Args:
        finite: whether all are, ().
        whose: model computed them.
        where: in the model.
        dtype: of the states.

    Raises:
        InputError: they are not.
    """
    if not finite:
        raise InputError(
            f"{whose} computes values that are not finite in {where}, on the calibration segments in "
            f"{str(dtype).removeprefix('torch.')}: model.dtype=float32 has the widest range"
        )


@torch.no_grad()
def check_computes(model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor) -> None:
    """Refuse a model that does not compute finite hidden states for one segment: it is not worth hours.

    Args:
        model: the language model, on its device.
        blocks: its blocks, in the full-precision state.
        segments: calibration token ids, (N, T).

    Raises:
        InputError: it does not.
    """

    def check(index: int, output: torch.Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        check_states(hidden.isfinite().all(), "the model", f"block {index}", hidden.dtype)

    hooks = [
        block.register_forward_hook(lambda module, args, output, index=index: check(index, output))
        for index, block in enumerate(blocks)
    ]
    segment = segments[:1].to(next(model.parameters()).device)
    try:
        with autocast(segment.device):
            model(input_ids=segment, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def autocast(device: torch.device) -> torch.autocast:
    """Return the context of every forward pass: bfloat16 matrix products on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
