"""Coarse-to-fine preprocessing: outliers of weights are cut off, those of activations are scaled down (section 3.4).

Shapes: O out_features, I in_features, C channels.
"""

from collections.abc import Callable

import torch
from torch import nn

from cbq.errors import InputError, check_flag, check_number
from cbq.models.equivalent import producer_maxima, scale_channels_, scale_columns, scale_rows
from cbq.models.families import scaling_pairs
from cbq.models.pairs import ScalingPair
from cbq.preprocess.outliers import RESERVED, largest_reserved
from cbq.preprocess.statistics import InputStatistics, input_statistics, no_statistics
from cbq.preprocess.step import Preprocessing
from cbq.quant.linear import QuantLinear
from cbq.streams.places import ON_DEVICE, Place

ROWS_AT_ONCE = 256
SMALLEST_CHANNEL_SCALE = 1e-2  # a channel that is always zero is not blown up without end


def relative_to_reserved(maxima: torch.Tensor, reserved: torch.Tensor) -> torch.Tensor:
    """Return sqrt(maximum / largest reserved maximum) for the outliers, and 1 for all other channels.

    Example:
        >>> relative_to_reserved(torch.tensor([1.0, 2.0, 32.0]), torch.tensor(2.0)).tolist()
        [1.0, 1.0, 4.0]
    """
    scale = (maxima / reserved).clamp_min(1).sqrt()
    return torch.where(reserved > 0, scale, torch.ones_like(scale))  # nothing is large compared with nothing


def relative_to_largest(maxima: torch.Tensor, reserved: torch.Tensor) -> torch.Tensor:
    """Return sqrt(maximum / largest maximum) for every channel, or 1 where there is no outlier.

    Example:
        >>> relative_to_largest(torch.tensor([2.0, 8.0, 32.0]), torch.tensor(8.0)).tolist()
        [0.25, 0.5, 1.0]

    Source: Eq. 14 read literally: Max(O*) is the largest outlier.
    """
    largest = maxima.max()
    scale = (maxima / largest).sqrt().clamp_min(SMALLEST_CHANNEL_SCALE)
    return torch.where(largest > reserved, scale, torch.ones_like(scale))


CHANNEL_SCALES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "reserved": relative_to_reserved,
    "largest": relative_to_largest,
}


def always(linear: QuantLinear, limits: torch.Tensor) -> torch.Tensor:
    """Return `limits` (O, 1): every outlier of a weight is cut off, as the paper has it."""
    return limits


def where_better(linear: QuantLinear, limits: torch.Tensor) -> torch.Tensor:
    """Return `limits` (O, 1) for the output channels whose squared rounding error they lessen, else the largest |w|.

    Cutting off makes the grid finer and the cut-off weights wrong: the fewer bits, the more the first counts.
    """
    if linear.weight_quantizer is None:
        return limits
    weight = linear.weight.float()
    whole = weight.abs().amax(-1, keepdim=True)
    cut = linear.weight_quantizer.nearest(weight.clamp(-limits, limits))
    errors = [
        (rounded - weight).square().sum(-1, keepdim=True) for rounded in (cut, linear.weight_quantizer.nearest(weight))
    ]
    return torch.where(errors[0] < errors[1], limits, whole)


TRUNCATIONS: dict[str, Callable[[QuantLinear, torch.Tensor], torch.Tensor]] = {
    "where_better": where_better,
    "always": always,
}


class CoarseToFine(Preprocessing):
    """The paper's preprocessing.

    Args:
        weights: cut off the outliers of each output channel of each weight.
        activations: scale down the channels of activations that are outliers, and the weights before them, and scale
            up the weights after them.
        lambda1: see `largest_reserved`.
        lambda2: see `largest_reserved`.
        reserved: `all` or `coarse`; see `largest_reserved`.
        truncate: `where_better`, only in output channels whose rounding error it lessens, or `always`, the paper's.
        relative_to: `reserved`, outliers are brought to the geometric mean of their size and the largest reserved
            channel's; or `largest`, Eq. 14 read literally.

    Raises:
        InputError: an option is unknown or out of range.

    Source: section 3.4, Algorithm 1, Eq. 14.
    Note: the paper cuts off every outlier; at 6 and 8 bits, where the grid is fine enough, that made pico worse, hence
        `truncate`. A weight is cut off by its quantizer, whose range leaves the outliers out: what the windows learn to
        reproduce stays the original model.
    """

    def __init__(
        self,
        weights: bool,
        activations: bool,
        lambda1: float = 1.5,
        lambda2: float = 1.0,
        reserved: str = "all",
        relative_to: str = "reserved",
        truncate: str = "where_better",
    ) -> None:
        for key, value in {"weights": weights, "activations": activations}.items():
            check_flag(f"preprocess.{key}", value)
        for key, value in {"lambda1": lambda1, "lambda2": lambda2}.items():
            check_number(f"preprocess.{key}", value)
        for key, value, choices in (
            ("reserved", reserved, RESERVED),
            ("relative_to", relative_to, CHANNEL_SCALES),
            ("truncate", truncate, TRUNCATIONS),
        ):
            if value not in choices:
                raise InputError(f"preprocess.{key} must be one of {', '.join(choices)}, got {value!r}")
        self.weights = weights
        self.activations = activations
        self.lambda1, self.lambda2, self.reserved = lambda1, lambda2, reserved
        self.channel_scale = CHANNEL_SCALES[relative_to]
        self.truncation = TRUNCATIONS[truncate]

    @torch.no_grad()
    def apply_(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
        """Change the blocks' weights and the ranges of their weight quantizers; the model computes what it did.

        Args:
            model: the language model, its linears in the full-precision state.
            blocks: its blocks.
            segments: calibration token ids, (N, T).
            place: where streams are kept meanwhile.
        """
        observed = self.activations
        statistics = input_statistics(model, blocks, segments, place) if observed else no_statistics(blocks)
        for block, ranges in zip(blocks, statistics, strict=True):
            linears = {name: module for name, module in block.named_modules() if isinstance(module, QuantLinear)}
            # Before activations are scaled: that makes columns of weights larger on purpose.
            limits = {name: self.weight_limits(linear) for name, linear in linears.items()}
            for pair in scaling_pairs(model.config, block) if self.activations else ():
                self.scale_activations_(pair, block, ranges, limits)
            for name, linear in linears.items():
                if linear.weight_quantizer is not None:
                    linear.weight_quantizer.set_range_(linear.weight.float().clamp(-limits[name], limits[name]))

    def weight_limits(self, linear: QuantLinear) -> torch.Tensor:
        """Return the largest |w| of each output channel of `linear` that is to be kept, (O, 1)."""
        magnitudes = linear.weight.float().abs()
        if not self.weights:
            return magnitudes.amax(-1, keepdim=True)
        # Some rows at a time: the search needs a dozen numbers a weight.
        limits = [
            largest_reserved(rows, self.lambda1, self.lambda2, self.reserved) for rows in magnitudes.split(ROWS_AT_ONCE)
        ]
        return self.truncation(linear, torch.cat(limits).unsqueeze(-1))

    def scale_activations_(
        self,
        pair: ScalingPair,
        block: nn.Module,
        ranges: dict[str, InputStatistics],
        limits: dict[str, torch.Tensor],
    ) -> None:
        """Scale the channels between a producer and its consumers, and the weights' limits with the weights."""
        channels = producer_maxima(pair, block, ranges[pair.consumers[0]].maxima)
        reserved = largest_reserved(channels[None], self.lambda1, self.lambda2, self.reserved).squeeze(0)
        scale = self.channel_scale(channels, reserved)
        scale_channels_(pair, block, scale)
        if pair.producer in limits:
            limits[pair.producer] = scale_rows(pair, limits[pair.producer], scale)
        for name in pair.consumers:
            limits[name] = scale_columns(pair, limits[name], scale, block.get_submodule(name).in_features)
