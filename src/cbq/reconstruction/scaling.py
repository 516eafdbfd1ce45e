"""Channel scales that are learned with a window: an equivalent transformation whose factors follow the loss.

Shapes: I in_features, C channels of a producer.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from cbq.activations import ActivationCache, autocast
from cbq.errors import InputError, check_flag, check_number
from cbq.models.equivalent import producer_maxima, scale_channels_, scale_columns, scale_rows
from cbq.models.experts import every_token
from cbq.models.families import scaling_pairs
from cbq.models.pairs import ScalingPair
from cbq.quant.linear import QuantLinear
from cbq.quant.quantizer import StaticActQuantizer, act_quantizers
from cbq.quant.state import QuantState, quant_state
from cbq.reconstruction.windows import Window

SMALLEST_MAXIMUM = 1e-4


class LearnedScaling:
    """Learns, for each channel between a producer and its consumers, what one is divided by and the other multiplied.

    The scales start where SmoothQuant puts them, s = max|X|^alpha / max|W|^(1 - alpha), and are learned as a factor's
    logarithm. Ranges of weights follow the scaled weights. At the end of a window the scales are folded in.

    Args:
        learning_rate: of the logarithms.
        alpha: 0 to 1.
        weight_only: also where the consumers' inputs are not quantized.

    Raises:
        InputError: an option is out of range.

    Source: Shao et al. (2023), Eq. 3 (learnable equivalent transformation).
    Note: the shift of channels is not learned, nor the scale between queries and keys. The paper learns the scale
        itself; its logarithm keeps it positive. Its code for LLaMA leaves the input of `down_proj` alone; here it is
        scaled too.
    """

    def __init__(self, learning_rate: float = 5e-3, alpha: float = 0.5, weight_only: bool = False) -> None:
        check_number("reconstruction.scaling.learning_rate", learning_rate)
        check_number("reconstruction.scaling.alpha", alpha)
        check_flag("reconstruction.scaling.weight_only", weight_only)
        if alpha > 1:
            raise InputError(f"reconstruction.scaling.alpha must be at most 1, got {alpha!r}")
        self.learning_rate, self.alpha, self.weight_only = learning_rate, alpha, weight_only

    def check(self, blocks: Iterable[nn.Module]) -> None:
        """Refuse blocks with which scales cannot be learned.

        Args:
            blocks: made quantizable.

        Raises:
            InputError: a linear quantizes its input in a range that would not follow the scales.
        """
        if any(isinstance(q, StaticActQuantizer) for q in act_quantizers(list(blocks))):
            raise InputError("reconstruction.scaling needs quant.act_granularity=token: a static range does not follow")

    def start(self, window: Window, cache: ActivationCache, new: set[nn.Module]) -> "WindowScaling":
        """Return the scales of a window, already at work in its blocks.

        Args:
            window: which blocks.
            cache: its quantized stream must be at window.start.
            new: the linears that no window has learned yet; the scales of others start at 1.

        Raises:
            InputError: see `check`.
        """
        self.check(cache.blocks)
        return WindowScaling(window, cache, self, new)


class WindowScaling(nn.Module):
    """The scales of one window's blocks, at work until `fold_`.

    Args:
        window: which blocks.
        cache: runs them; its quantized stream is the window's input.
        options: what the user chose.
        new: see `LearnedScaling.start`.
    """

    def __init__(self, window: Window, cache: ActivationCache, options: LearnedScaling, new: set[nn.Module]) -> None:
        super().__init__()
        self.learning_rate = options.learning_rate
        self.blocks = tuple(cache.blocks[window.start : window.stop])  # a tuple: the blocks are not part of this module
        self.pairs: list[tuple[nn.Module, ScalingPair, ChannelScale]] = []
        self.channel_scales = nn.ModuleList()
        self.hooks = []
        # Of weights' ranges that are covered; None is all.
        self.shares: dict[QuantLinear, tuple[torch.Tensor, torch.Tensor] | None] = {}
        for block, maxima in zip(self.blocks, input_maxima(window, cache), strict=True):
            for pair in scaling_pairs(cache.config, block):
                consumers = [block.get_submodule(name) for name in pair.consumers]
                if options.weight_only or any(linear.act_quantizer is not None for linear in consumers):
                    start = smooth_scale(pair, block, maxima[pair.consumers[0]], options.alpha)
                    if not new.issuperset(consumers):
                        start = torch.ones_like(start)
                    self._attach(block, pair, ChannelScale(start))

    def _attach(self, block: nn.Module, pair: ScalingPair, scale: "ChannelScale") -> None:
        """Put a scale to work between a producer and its consumers."""
        self.pairs.append((block, pair, scale))
        self.channel_scales.append(scale)
        producer = block.get_submodule(pair.producer)
        for name in (pair.producer, *pair.consumers):
            linear = block.get_submodule(name)
            if isinstance(linear, QuantLinear) and linear.weight_quantizer is not None and linear not in self.shares:
                self.shares[linear] = linear.weight_quantizer.covered_shares(linear.weight)
                self.hooks.append(linear.register_forward_pre_hook(self.follow_range))
        for name in ("weight", "bias"):
            if getattr(producer, name, None) is not None:
                parametrize.register_parametrization(producer, name, DividedRows(pair, scale))
        for name in (*pair.consumers, *pair.others):
            linear = block.get_submodule(name)
            parametrize.register_parametrization(linear, "weight", MultipliedColumns(pair, scale))

    def follow_range(self, linear: QuantLinear, args: tuple = ()) -> None:
        """Let a linear's grid cover as much of its weight, as it is scaled now, as before."""
        linear.weight_quantizer.follow_range_(linear.weight, self.shares[linear])

    def reset_(self) -> None:
        """Let every scale be 1."""
        for scale in self.channel_scales:
            nn.init.zeros_(scale.logarithm)

    def cover_all_(self) -> None:
        """Let grids cover the whole range of their weights from now on."""
        self.shares = dict.fromkeys(self.shares)

    @torch.no_grad()
    def fold_(self) -> None:
        """Write the scales into the weights, and leave nothing behind."""
        for hook in self.hooks:
            hook.remove()
        for block, pair, _ in self.pairs:
            for name in (pair.producer, *pair.consumers, *pair.others):
                module = block.get_submodule(name)
                for tensor in list(getattr(module, "parametrizations", {})):
                    parametrize.remove_parametrizations(module, tensor, leave_parametrized=False)
        for block, pair, scale in self.pairs:
            scale_channels_(pair, block, scale())
        for linear in self.shares:
            self.follow_range(linear)


@contextmanager
def given_back(scaling: WindowScaling | None) -> Iterator[None]:
    """Fold scales into the weights at the end; after an error leave the weights as they were."""
    try:
        yield
    except BaseException:
        if scaling:
            scaling.reset_()
        raise
    finally:
        if scaling:
            scaling.fold_()


class ChannelScale(nn.Module):
    """One scale a channel, learned as its logarithm.

    Args:
        start: (C,), positive.
    """

    def __init__(self, start: torch.Tensor) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(start.log(), requires_grad=False)

    def forward(self) -> torch.Tensor:
        """Return the scale, (C,)."""
        return self.logarithm.exp()


class DividedRows(nn.Module):
    """A producer's parameter, (C,) or (C, any), divided by its channels' scale."""

    def __init__(self, pair: ScalingPair, scale: ChannelScale) -> None:
        super().__init__()
        self.pair, self.scale = pair, scale

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return scale_rows(self.pair, parameter, self.scale(), self.pair.gain_offset).to(parameter.dtype)


class MultipliedColumns(nn.Module):
    """A consumer's weight, (O, I), times the scale of the channels it reads."""

    def __init__(self, pair: ScalingPair, scale: ChannelScale) -> None:
        super().__init__()
        self.pair, self.scale = pair, scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return scale_columns(self.pair, weight, self.scale(), weight.shape[1]).to(weight.dtype)


def smooth_scale(pair: ScalingPair, block: nn.Module, maxima: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return SmoothQuant's scale of each channel, (C,), for the largest |x| of each input feature, (I,)."""
    columns = torch.stack([block.get_submodule(name).weight.float().abs().amax(0) for name in pair.consumers]).amax(0)
    activations, weights = (producer_maxima(pair, block, values) for values in (maxima, columns))
    scale = activations.clamp_min(SMALLEST_MAXIMUM).pow(alpha) / weights.clamp_min(SMALLEST_MAXIMUM).pow(1 - alpha)
    return scale.clamp_min(SMALLEST_MAXIMUM)


@torch.no_grad()
def input_maxima(window: Window, cache: ActivationCache) -> list[dict[str, torch.Tensor]]:
    """Return, for each block of a window, the largest |x| of each input feature, (I,), of its linears by name.

    Taken on the quantized stream, through the window's blocks in full precision.
    """
    blocks = list(cache.blocks[window.start : window.stop])
    found: list[dict[str, torch.Tensor]] = [{} for _ in blocks]

    def remember(maxima: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> None:
        largest = x.detach().float().abs().flatten(0, -2).amax(0)
        maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

    hooks = [
        linear.register_forward_pre_hook(lambda module, args, maxima=maxima, name=name: remember(maxima, name, args[0]))
        for block, maxima in zip(blocks, found, strict=True)
        for name, linear in block.named_modules()
        if isinstance(linear, QuantLinear)
    ]
    try:
        with quant_state(blocks, QuantState.FULL_PRECISION), every_token(cache.blocks):
            for part in cache.parts(len(cache)):
                with autocast(cache.device):
                    cache.run_blocks(window.start, window.stop, cache.quantized[part])
    finally:
        for hook in hooks:
            hook.remove()
    return found
