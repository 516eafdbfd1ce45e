"""What preprocessing must know of the calibration data: one pass of the full-precision stream, block by block.

Shapes: N segments, T tokens, I in_features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cbq.activations import ActivationCache
from cbq.quant.linear import quant_linears
from cbq.quant.quantizer import StaticActQuantizer
from cbq.streams.places import ON_DEVICE, Place


@dataclass
class InputRange:
    """What one linear's input was, over all tokens.

    Args:
        low: the smallest value of each input feature, (I,), float32.
        high: the largest, (I,), float32.
    """

    low: torch.Tensor
    high: torch.Tensor

    @property
    def maxima(self) -> torch.Tensor:
        """The largest |x| of each input feature, (I,)."""
        return torch.maximum(self.low.abs(), self.high.abs())


def input_ranges(
    model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE
) -> Iterator[dict[str, InputRange]]:
    """Yield, for each block in order, the range of the input of each of its linears, by their names.

    The stream has passed a block when its statistics come: the block may then be changed.

    Args:
        model: the language model, its linears in the full-precision state.
        blocks: its blocks.
        segments: calibration token ids, (N, T).
        place: where the stream is kept.
    """
    cache = ActivationCache(model, blocks, segments, place=place)
    cache.quantized = None  # one stream is enough here
    for index, block in enumerate(blocks):
        ranges: dict[str, InputRange] = {}

        def update(name: str, x: torch.Tensor, ranges: dict[str, InputRange] = ranges) -> None:
            low, high = torch.aminmax(x.detach().float().flatten(0, -2), dim=0)
            if name in ranges:
                low, high = torch.minimum(low, ranges[name].low), torch.maximum(high, ranges[name].high)
            ranges[name] = InputRange(low, high)

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: update(name, args[0]))
            for name, module in block.named_modules()
            if getattr(module, "in_features", None)
        ]
        try:
            cache.advance_full_precision(index + 1)
        finally:
            for hook in hooks:
                hook.remove()
        yield ranges


def set_act_ranges_(model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
    """Give every static activation quantizer of the blocks the range of its linear's input; where there is none, do
    nothing.

    Args:
        model: the language model, its linears in the full-precision state.
        blocks: its blocks.
        segments: calibration token ids, (N, T).
        place: where the stream is kept meanwhile.
    """
    if not any(isinstance(linear.act_quantizer, StaticActQuantizer) for linear in quant_linears(blocks)):
        return
    for block, ranges in zip(blocks, input_ranges(model, blocks, segments, place), strict=True):
        for name, found in ranges.items():
            quantizer = block.get_submodule(name).act_quantizer
            if isinstance(quantizer, StaticActQuantizer):
                quantizer.set_range_(found.low.amin(), found.high.amax())
