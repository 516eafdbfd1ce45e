"""What preprocessing must know of the calibration data: one pass of the full-precision stream, block by block.

Shapes: N segments, T tokens, S tokens of a sample, I in_features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cbq.activations import ActivationCache
from cbq.models.experts import Experts, counted_tokens, every_token
from cbq.models.offload import moved
from cbq.quant.linear import quant_linears
from cbq.quant.quantizer import StaticActQuantizer
from cbq.streams.places import ON_DEVICE, Place


@dataclass
class InputStatistics:
    """What one linear's input was, over all tokens; float32.

    Args:
        low: the smallest value of each input feature, (I,).
        high: the largest, (I,).
        mean_magnitude: the mean of |x| of each input feature, (I,).
        sample: evenly spaced tokens, (S, I); S is what was asked for or a little less.
    """

    low: torch.Tensor
    high: torch.Tensor
    mean_magnitude: torch.Tensor
    sample: torch.Tensor

    @property
    def maxima(self) -> torch.Tensor:
        """The largest |x| of each input feature, (I,)."""
        return torch.maximum(self.low.abs(), self.high.abs())


class _Collector:
    """Gathers one linear's statistics from its inputs, batch by batch.

    Args:
        every: a token of this many goes into the sample; 0 takes none.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.num_tokens = 0
        self.low = self.high = self.sum = None
        self.sample: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, args: tuple) -> None:
        x = args[0].detach().float().flatten(0, -2)
        low, high = torch.aminmax(x, dim=0)
        total = x.abs().sum(0, dtype=torch.float64)
        self.low = low if self.low is None else torch.minimum(low, self.low)
        self.high = high if self.high is None else torch.maximum(high, self.high)
        self.sum = total if self.sum is None else self.sum + total
        if self.every:
            self.sample.append(x[-self.num_tokens % self.every :: self.every].clone())
        self.num_tokens += len(x)

    def statistics(self) -> InputStatistics:
        sample = torch.cat(self.sample) if self.sample else self.low.new_empty(0, len(self.low))
        return InputStatistics(self.low, self.high, (self.sum / self.num_tokens).float(), sample)


def input_statistics(
    model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE, num_samples: int = 0
) -> Iterator[dict[str, InputStatistics]]:
    """Yield, for each block in order, what the input of each of its linears was, by their names.

    The stream has passed a block when its statistics come: the block, on its device, may then be changed.

    Args:
        model: the language model, its linears in the full-precision state.
        blocks: its blocks.
        segments: calibration token ids, (N, T).
        place: where the stream is kept.
        num_samples: tokens to keep.
    """
    cache = ActivationCache(model, blocks, segments, place=place)
    cache.quantized = None  # one stream is enough here
    every = -(-segments.numel() // num_samples) if num_samples else 0
    for index, block in enumerate(blocks):
        linears = {name: module for name, module in block.named_modules() if getattr(module, "in_features", None)}
        collectors = {name: _Collector(every) for name in linears}
        hooks = [linear.register_forward_pre_hook(collectors[name]) for name, linear in linears.items()]
        with moved([block]):
            try:
                with every_token(blocks):
                    cache.advance_full_precision(index + 1)
            finally:
                for hook in hooks:
                    hook.remove()
            yield {name: collector.statistics() for name, collector in collectors.items()}


def no_statistics(blocks: nn.ModuleList) -> Iterator[dict[str, InputStatistics]]:
    """Yield nothing for each block in order, which is then on its device and may be changed, as it may be above."""
    for block in blocks:
        with moved([block]):
            yield {}


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
    for block, statistics in zip(blocks, input_statistics(model, blocks, segments, place), strict=True):
        for name, found in statistics.items():
            quantizer = block.get_submodule(name).act_quantizer
            if isinstance(quantizer, StaticActQuantizer):
                quantizer.set_range_(found.low.amin(), found.high.amax())


def expert_tokens(
    model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE
) -> dict[str, list[int]]:
    """Return how many calibration tokens each expert of each mixture of the blocks is sent, by the mixture's name.

    Args:
        model: the language model, its linears in the full-precision state.
        blocks: its blocks.
        segments: calibration token ids, (N, T).
        place: where the stream is kept meanwhile.
    """
    if not any(isinstance(module, Experts) for module in blocks.modules()):
        return {}
    cache = ActivationCache(model, blocks, segments, place=place)
    cache.quantized = None  # one stream is enough here
    with counted_tokens(blocks) as counts:
        for stop in range(1, len(blocks) + 1):  # block by block, as they fit on the device
            cache.advance_full_precision(stop)
    return {name: found.tolist() for name, found in counts.items()}
