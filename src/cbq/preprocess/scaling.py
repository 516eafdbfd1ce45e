"""The rivals of coarse-to-fine preprocessing that scale channels of activations: Tables 3a and 10.

All divide the output channels of a norm or a linear by a factor each and multiply what reads them by it, so that the
model computes what it did. They differ in the factor.

Shapes: O out_features, I in_features, C channels of a producer, S tokens of a sample.
"""

from abc import abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from cbq.errors import InputError, check_flag
from cbq.models.equivalent import (
    channel_of_input,
    producer_maxima,
    scale_channels_,
    shift_channels_,
)
from cbq.models.families import get_blocks, scaling_pairs
from cbq.models.pairs import Pairs, ScalingPair
from cbq.preprocess.clipping import clip_for_outputs
from cbq.preprocess.statistics import InputStatistics, input_statistics
from cbq.preprocess.step import Preprocessing
from cbq.quant.linear import QuantLinear
from cbq.streams.places import ON_DEVICE, Place

NUM_SAMPLES = 512  # tokens that a search compares outputs on
SMALLEST_SCALE = 1e-4


class ChannelScaling(Preprocessing):
    """Scales the channels between producers and consumers; a method gives the scale.

    Args:
        num_samples: tokens that `channel_scale` wants to see.
    """

    def __init__(self, num_samples: int = 0) -> None:
        self.num_samples = num_samples

    @torch.no_grad()
    def apply_(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
        """Change the blocks' weights and the ranges of their weight quantizers; the model computes what it did.

        Args:
            model: the language model, its linears in the full-precision state.
            blocks: its blocks.
            segments: calibration token ids, (N, T).
            place: where streams are kept meanwhile.
        """
        for block, statistics in zip(
            blocks, input_statistics(model, blocks, segments, place, self.num_samples), strict=True
        ):
            for pair in self.taken(model, block):
                self.scale_(Channels(pair, block, statistics))
            for name, inputs in statistics.items():
                linear = block.get_submodule(name)
                if linear.weight_quantizer is not None:
                    self.set_range_(linear, inputs)

    def notes(self, model: nn.Module) -> list[str]:
        if any(self.taken(model, block) for block in get_blocks(model)):
            return []
        return [f"preprocess: {type(self).__name__} scales nothing: this model has no channels that it can scale"]

    def taken(self, model: nn.Module, block: nn.Module) -> Pairs:
        """Return the pairs of a block that the method scales."""
        pairs = scaling_pairs(model.config, block)
        return tuple(pair for pair in pairs if self.takes(block.get_submodule(pair.producer)))

    def takes(self, producer: nn.Module) -> bool:
        """Return whether the method scales what `producer` puts out: for most, what norms do."""
        return not isinstance(producer, QuantLinear)

    @abstractmethod
    def scale_(self, channels: "Channels") -> None:
        """Scale the channels."""

    def set_range_(self, linear: QuantLinear, inputs: InputStatistics) -> None:
        """Set the range of the weight quantizer of a scaled `linear`; its inputs' sample is scaled too."""
        linear.weight_quantizer.set_range_(linear.weight)


class Channels:
    """The channels between one producer and its consumers.

    Args:
        pair: which modules.
        block: has them.
        statistics: what the inputs of the block's linears were; samples are scaled with the channels.

    Attributes:
        inputs: what the consumers' input was.
        maxima: the largest |x| of each channel, (C,).
    """

    def __init__(self, pair: ScalingPair, block: nn.Module, statistics: dict[str, InputStatistics]) -> None:
        self.pair, self.block = pair, block
        self.all_inputs = [statistics[name] for name in pair.consumers]
        self.inputs = self.all_inputs[0]
        self.producer = block.get_submodule(pair.producer)
        self.consumers: list[QuantLinear] = [block.get_submodule(name) for name in pair.consumers]
        self.maxima = self.of_inputs(self.inputs.maxima)

    def of_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest of non-negative `values` of input features (I,) for each channel, (C,)."""
        return producer_maxima(self.pair, self.block, values)

    def weight_maxima(self) -> torch.Tensor:
        """Return the largest |w| that reads each channel, over all consumers, (C,)."""
        columns = torch.stack([linear.weight.float().abs().amax(0) for linear in self.consumers])
        return self.of_inputs(columns.amax(0))

    def scale_(self, scale: torch.Tensor) -> None:
        """Divide the channels by `scale` (C,) and multiply what reads them by it."""
        scale_channels_(self.pair, self.block, scale)
        for inputs in self.all_inputs:
            inputs.sample = inputs.sample / self.of_features(scale)

    def shift_(self, shift: torch.Tensor) -> None:
        """Subtract `shift` (C,) from the channels, and let the biases of what reads them take it."""
        shift_channels_(self.pair, self.block, shift)
        for inputs in self.all_inputs:
            inputs.sample, inputs.low, inputs.high = inputs.sample - shift, inputs.low - shift, inputs.high - shift
        self.maxima = self.of_inputs(self.inputs.maxima)

    def of_features(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the value of each input feature's channel, (I,), for values of channels (C,)."""
        channels = channel_of_input(len(scale), len(self.inputs.low), self.pair.head_dim)
        return scale[channels.to(scale.device)]

    def output_error(self, scale: torch.Tensor) -> float:
        """Return the mean squared error of the consumers' outputs, rounded to nearest with channels scaled by `scale`.

        Compared on the sample, with the full-precision output; nothing is changed.
        """
        x, of_features = self.inputs.sample, self.of_features(scale)
        error, count = 0.0, 0
        for linear in self.consumers:
            weight = linear.weight.float()
            scaled = weight * of_features
            if linear.weight_quantizer is not None:
                scaled = linear.weight_quantizer.nearest(scaled)
            smooth = x / of_features
            if linear.act_quantizer is not None:
                linear.act_quantizer.set_range_(smooth.amin(), smooth.amax())
                smooth = linear.act_quantizer.nearest(smooth)
            error += (F.linear(smooth, scaled) - F.linear(x, weight)).square().sum().item()
            count += len(x) * len(weight)
        return error / count

    def best(self, scales: Iterator[torch.Tensor]) -> torch.Tensor:
        """Return which of `scales`, each (C,), has the smallest `output_error`; the first of equals."""
        candidates = [(self.output_error(scale), number, scale) for number, scale in enumerate(scales)]
        return min(candidates, key=lambda candidate: candidate[:2])[2]


class SmoothQuant(ChannelScaling):
    """Moves a fixed share of the difficulty from activations to weights: s = max|X|^alpha / max|W|^(1 - alpha).

    Args:
        alpha: 0 (all stays in the activations) to 1 (all goes into the weights); the paper's is 0.5.

    Raises:
        InputError: alpha is out of range.

    Source: Xiao et al. (2022), Eq. 4.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 1:
            raise InputError(f"preprocess.alpha must be a number from 0 to 1, got {alpha!r}")
        self.alpha = alpha

    def scale_(self, channels: Channels) -> None:
        activations = channels.maxima.clamp_min(SMALLEST_SCALE).pow(self.alpha)
        weights = channels.weight_maxima().clamp_min(SMALLEST_SCALE).pow(1 - self.alpha)
        channels.scale_((activations / weights).clamp_min(SMALLEST_SCALE))


class OutlierSuppression(ChannelScaling):
    """Moves a norm's weight into the linears after it ("gamma migration"): outliers are often that weight's doing.

    Source: Wei et al. (2022b), section 4.1.
    Note: the token-wise clipping of the same paper is left out.
    """

    def scale_(self, channels: Channels) -> None:
        gamma = channels.producer.weight.float() + channels.pair.gain_offset
        channels.scale_(torch.where(gamma == 0, torch.ones_like(gamma), gamma))


class OutlierSuppressionPlus(ChannelScaling):
    """Shifts each channel to be symmetric about 0, where biases can take it, and scales down those above a threshold.

    s = max(1, max|X| / t); t is searched below the largest channel, for the smallest error of the quantized outputs.

    Args:
        grid: thresholds that are tried.
        shift: shift the channels, where the norm and all linears after it have a bias.

    Raises:
        InputError: an option is out of range.

    Source: Wei et al. (2023), Eq. 4 to 9.
    Note: the error is that of the linears' outputs, each rounded to nearest; the paper compares attention's.
        RMSNorm has no bias: there is nothing to shift on LLaMA.
    """

    def __init__(self, grid: int = 40, shift: bool = True) -> None:
        super().__init__(NUM_SAMPLES)
        check_grid(grid)
        check_flag("preprocess.shift", shift)
        self.grid, self.shift = grid, shift

    def scale_(self, channels: Channels) -> None:
        modules = [channels.producer, *channels.consumers]
        if self.shift and all(getattr(module, "bias", None) is not None for module in modules):
            channels.shift_((channels.inputs.high + channels.inputs.low) / 2)
        channels.scale_(channels.best(self.scales(channels.maxima)))

    def scales(self, maxima: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the scale of each threshold, (C,): first that of the largest channel, which scales nothing."""
        for step in range(self.grid):
            threshold = maxima.max() * (1 - step / self.grid)
            yield (maxima / threshold.clamp_min(SMALLEST_SCALE)).clamp_min(1)


class ActivationAware(ChannelScaling):
    """Scales up the weights of channels whose activations are large, so that rounding hurts them less (AWQ).

    s = mean|X|^alpha, normalized, for the alpha whose quantized outputs have the smallest error; then each weight
    group's range is shrunk for the same.

    Args:
        grid: alphas that are tried, from 0 (no scaling) on.
        clip: shrink the ranges.

    Raises:
        InputError: an option is out of range.

    Source: Lin et al. (2023), Eq. 4 and 5.
    Note: the error is that of the linears' outputs; the released code compares the whole attention's and the whole
        feed-forward's.
    """

    def __init__(self, grid: int = 20, clip: bool = True) -> None:
        super().__init__(NUM_SAMPLES)
        check_grid(grid)
        check_flag("preprocess.clip", clip)
        self.grid, self.clip = grid, clip

    def takes(self, producer: nn.Module) -> bool:
        return True

    def scale_(self, channels: Channels) -> None:
        channels.scale_(channels.best(self.scales(channels.of_inputs(channels.inputs.mean_magnitude))))

    def set_range_(self, linear: QuantLinear, inputs: InputStatistics) -> None:
        weight = linear.weight
        if self.clip:
            weight = clip_for_outputs(linear.weight_quantizer, weight.float(), inputs.sample)
        linear.weight_quantizer.set_range_(weight)

    def scales(self, magnitudes: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the scale of each alpha, (C,), its largest and its smallest the inverse of each other."""
        for step in range(self.grid):
            scale = magnitudes.clamp_min(SMALLEST_SCALE).pow(step / self.grid)
            yield scale / (scale.max() * scale.min()).sqrt()


def check_grid(grid: int) -> None:
    """Refuse what is no number of candidates.

    Raises:
        InputError: not an integer of at least 1.
    """
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
        raise InputError(f"preprocess.grid must be an integer of at least 1, got {grid!r}")
