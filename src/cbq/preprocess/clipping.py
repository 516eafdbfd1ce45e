"""Smaller ranges for a smaller rounding error: clipping what little lies outside (Tables 3a and 10).

Shapes: O out_features, I in_features, G groups a row, g group size, S tokens of a sample.
"""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from cbq.errors import InputError, check_flag
from cbq.preprocess.statistics import InputStatistics, input_statistics
from cbq.preprocess.step import Preprocessing
from cbq.quant.affine import to_groups
from cbq.quant.linear import QuantLinear
from cbq.quant.quantizer import ActQuantizer, WeightQuantizer, act_quantizers
from cbq.streams.places import ON_DEVICE, Place

RATIOS = tuple(1 - step / 20 for step in range(15))  # of the whole range that searches try: 1 to 0.3
NUM_SAMPLES = 512
ROWS_AT_ONCE = 512


def clip_to(groups: torch.Tensor, ratio: float | torch.Tensor) -> torch.Tensor:
    """Return `groups` (O, G, g) cut off at `ratio`, one or (O, G, 1), of each group's own range.

    Example:
        >>> clip_to(torch.tensor([[[-4.0, 1.0, 2.0]]]), 0.5).tolist()
        [[[-2.0, 1.0, 1.0]]]
    """
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    return groups.clamp(low * ratio, high * ratio)


def best_clip(
    quantizer: WeightQuantizer, weight: torch.Tensor, error: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return `weight` (O, I) with each group cut off where rounding to nearest then has the smallest error.

    Args:
        quantizer: its bits, groups and symmetry count.
        weight: float32.
        error: of each group, (O, G), given what rounding changed, (O, G, g).
    """
    groups = to_groups(weight, quantizer.group_size)
    best = torch.full(groups.shape[:-1], float("inf"), device=weight.device)
    chosen = torch.ones_like(best)
    for ratio in RATIOS:
        rounded = quantizer.nearest(clip_to(groups, ratio).flatten(1)).view_as(groups)
        found = error(rounded - groups)
        chosen = torch.where(found < best, ratio, chosen)
        best = torch.minimum(found, best)
    return clip_to(groups, chosen.unsqueeze(-1)).flatten(1)


def clip_for_weights(quantizer: WeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
    """Return `weight` (O, I) cut off for the smallest squared error of the weights themselves."""
    rows = weight.split(ROWS_AT_ONCE)
    return torch.cat([best_clip(quantizer, some, lambda change: change.square().sum(-1)) for some in rows])


def clip_for_outputs(quantizer: WeightQuantizer, weight: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """Return `weight` (O, I) cut off for the smallest squared error of each group's share of the output.

    Args:
        quantizer: its bits, groups and symmetry count.
        weight: float32.
        sample: inputs, (S, I).
    """
    by_group = to_groups(sample, quantizer.group_size).transpose(0, 1)  # (G, S, g)
    products = by_group.transpose(1, 2) @ by_group  # (G, g, g): what a change of weights does to the outputs, squared

    def error(change: torch.Tensor) -> torch.Tensor:
        by_group = change.transpose(0, 1)  # (G, O, g)
        return (by_group @ products * by_group).sum(-1).T

    return torch.cat([best_clip(quantizer, some, error) for some in weight.split(ROWS_AT_ONCE)])


class Clipping(Preprocessing):
    """Sets smaller ranges for weights and for activations.

    Args:
        weights: of weights.
        activations: of activations: one share of each token's range (of the whole range where it is static), a linear.

    Raises:
        InputError: an option is no truth value.
    """

    num_samples = NUM_SAMPLES

    def __init__(self, weights: bool = True, activations: bool = True) -> None:
        check_flag("preprocess.weights", weights)
        check_flag("preprocess.activations", activations)
        self.weights, self.activations = weights, activations

    def check(self, blocks: nn.ModuleList) -> None:
        if self.activations and any(not quantizer.has_multiplier for quantizer in act_quantizers(list(blocks))):
            raise InputError(
                "preprocess.activations must be false with quant.engine_activations=true, as of a target: engines "
                "cover the whole range of each token"
            )

    def clips_act_ranges(self, blocks: nn.ModuleList) -> bool:
        return self.activations

    @torch.no_grad()
    def apply_(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
        """Change the ranges of the blocks' quantizers.

        Args:
            model: the language model, its linears in the full-precision state.
            blocks: its blocks.
            segments: calibration token ids, (N, T).
            place: where streams are kept meanwhile.

        Raises:
            InputError: ranges of activations are wanted, where they are fixed.
        """
        self.check(blocks)
        statistics = input_statistics(model, blocks, segments, place, self.num_samples)
        for block, of_linears in zip(blocks, statistics, strict=True):
            for name, inputs in of_linears.items():
                self.set_ranges_(block.get_submodule(name), inputs)

    def set_ranges_(self, linear: QuantLinear, inputs: InputStatistics) -> None:
        """Set the ranges of one linear's quantizers."""
        if self.weights and linear.weight_quantizer is not None:
            linear.weight_quantizer.set_range_(self.clip(linear.weight_quantizer, linear.weight.float()))
        if self.activations and linear.act_quantizer is not None:
            linear.act_quantizer.set_range_(inputs.low.amin(), inputs.high.amax())
            linear.act_quantizer.clip_ratio.fill_(self.ratio(linear.act_quantizer, inputs.sample))

    @abstractmethod
    def clip(self, quantizer: WeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` (O, I) cut off."""

    @abstractmethod
    def ratio(self, quantizer: ActQuantizer, sample: torch.Tensor) -> float:
        """Return the share of its range that an activation quantizer should cover, judged by a sample (S, I)."""


class SmallestError(Clipping):
    """Takes the ranges with the smallest mean squared error of rounding (OMSE).

    Args:
        weights: see `Clipping`; one range an output channel or group.
        activations: see `Clipping`.

    Source: Choukroun et al. (2019).
    """

    def clip(self, quantizer: WeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
        return clip_for_weights(quantizer, weight)

    def ratio(self, quantizer: ActQuantizer, sample: torch.Tensor) -> float:
        errors = [
            (quantizer.quantize(sample, torch.tensor(ratio, device=sample.device)) - sample).square().mean().item()
            for ratio in RATIOS
        ]
        return RATIOS[errors.index(min(errors))]


class Percentile(Clipping):
    """Takes ranges that leave the largest values out.

    Args:
        percentile: of |w| in an output channel or group, and of |x| in a token, above which values are cut off.
        weights: see `Clipping`.
        activations: see `Clipping`; the share is the mean over tokens.

    Raises:
        InputError: percentile is out of range.

    Source: Zhou et al. (2017), "Percentile" of Table 3a, which prints no value: 99.9 is ours.
    """

    def __init__(self, percentile: float = 99.9, weights: bool = True, activations: bool = True) -> None:
        super().__init__(weights, activations)
        number = isinstance(percentile, int | float) and not isinstance(percentile, bool)
        if not number or not 50 <= percentile <= 100:
            raise InputError(f"preprocess.percentile must be a number from 50 to 100, got {percentile!r}")
        self.percentile = percentile

    def limits(self, values: torch.Tensor) -> torch.Tensor:
        """Return the percentile of |values| (..., n) along the last dimension, (..., 1)."""
        return values.abs().quantile(self.percentile / 100, dim=-1, keepdim=True)

    def clip(self, quantizer: WeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
        groups = to_groups(weight, quantizer.group_size)
        limits = self.limits(groups)
        return groups.clamp(-limits, limits).flatten(1)

    def ratio(self, quantizer: ActQuantizer, sample: torch.Tensor) -> float:
        largest = sample.abs().amax(-1, keepdim=True)
        shares = self.limits(sample)[largest > 0] / largest[largest > 0]
        return shares.mean().item() if len(shares) else 1.0  # of an input that is always zero there is nothing to cut
