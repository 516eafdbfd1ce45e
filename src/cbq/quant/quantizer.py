"""The learned step sizes: S_W of weights and S_X of activations (paper sections 3.1 and 5.1).

Shapes: O out_features, I in_features, G groups a row, g group size, T tokens.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from cbq.attributes import temporarily
from cbq.errors import InputError
from cbq.quant.affine import (
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    quant_range,
    quantize_affine,
    round_scale_ste,
    to_groups,
)
from cbq.quant.formulas import NEAREST, ZERO_POINT_FIRST
from cbq.quant.fused import fake_quantize
from cbq.quant.kernels import Blocked, Kernels
from cbq.quant.logits import Fusion, NoLogits
from cbq.quant.rounding import Rounding
from cbq.quant.step_size import SMALLEST_MULTIPLIER, Covered, ScaleMultiplier, StepSize


class WeightQuantizer(nn.Module):
    """Integers, scales and zero points of one weight.

    Args:
        weight: (O, I), any float dtype. Only its range is read.
        bits: 2 to 8.
        group_size: input features that share a scale; -1 for one scale a row.
        symmetric: no zero point.
        scale_dtype: what scales are rounded to.

    Attributes:
        kernels: what computes `forward`.
        step_size: how the grid is learned.
        initial_scale: of the range before learning, (O, G, 1), float32.
        initial_zero_point: likewise.

    Raises:
        InputError: `group_size` does not divide I.

    Source: S_W of Eq. 5 and 9.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bits: int,
        group_size: int = -1,
        symmetric: bool = False,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if group_size != -1 and weight.shape[1] % group_size:
            raise InputError(f"quant.group_size must divide the {weight.shape[1]} input features, got {group_size}")
        self.bits = bits
        self.group_size = group_size
        self.symmetric = symmetric
        self.scale_dtype = scale_dtype
        self.quant_min, self.quant_max = quant_range(bits)
        for name in ("low", "high", "initial_scale", "initial_zero_point"):
            self.register_buffer(name, None)
        self.set_range_(weight)
        self.step_size: StepSize = ScaleMultiplier(self.initial_scale)
        self.kernels: Kernels = Blocked()

    @torch.no_grad()
    def set_range_(self, weight: torch.Tensor) -> None:
        """Cover the range of `weight` (O, I): the weight itself, or a copy without its outliers, which then clip."""
        self.follow_range_(weight)

    def follow_range_(self, weight: torch.Tensor, shares: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Cover the range of `weight` (O, I) that is itself learned: the grid has a gradient with respect to it.

        Args:
            weight: the present one.
            shares: of its smallest and largest values that are covered, (O, G, 1); all if None.
        """
        groups = to_groups(weight, self.group_size)
        # Not aminmax: over a dimension it is nine times as slow as the two together on a CPU.
        self.low = groups.amin(-1, keepdim=True).float().clamp_max(0)
        self.high = groups.amax(-1, keepdim=True).float().clamp_min(0)
        if shares is not None:
            self.low, self.high = self.low * shares[0], self.high * shares[1]
        ends = torch.cat([self.low, self.high], dim=-1)
        scale, self.initial_zero_point = choose_qparams_affine(ends, self.bits, self.symmetric)
        self.initial_scale = round_scale_ste(scale, self.scale_dtype)

    @torch.no_grad()
    def covered_shares(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the shares of the smallest and largest values of `weight` (O, I) that the range covers, (O, G, 1)."""
        groups = to_groups(weight.float(), self.group_size)
        low, high = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
        return torch.where(low < 0, self.low / low, 1.0), torch.where(high > 0, self.high / high, 1.0)

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the learned scale, positive, and zero point, (O, G, 1), float32."""
        initial = self.initial_scale, self.initial_zero_point
        covered = Covered(self.low, self.high, *initial, self.quant_max, self.symmetric)
        scale, zero_point = self.step_size.grid(covered)
        return round_scale_ste(scale, self.scale_dtype), zero_point

    @property
    def scale(self) -> torch.Tensor:
        """The learned weight_scale, (O, G, 1), float32, positive."""
        return self.grid()[0]

    @property
    def zero_point(self) -> torch.Tensor:
        """The learned zero point, (O, G, 1), float32, integers."""
        return self.grid()[1]

    def integers(
        self, weight: torch.Tensor, rounding: Rounding, scale: torch.Tensor, zero_point: torch.Tensor
    ) -> torch.Tensor:
        """Return the integers of `weight` (O, I) as floats (O, G, g), differentiable in the grid and the rounding."""
        values = rounding(to_groups(weight.float(), self.group_size), self.initial_scale, scale)
        return (values + zero_point).clamp(self.quant_min, self.quant_max)

    def starting_integers(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the integers of round-to-nearest at the initial scale, (O, G, g): what learning starts from."""
        groups = to_groups(weight.float(), self.group_size)
        return quantize_affine(groups, self.initial_scale, self.initial_zero_point, self.quant_min, self.quant_max)

    def forward(self, weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        """Return `weight` (O, I) quantized and dequantized, in its own dtype."""
        (scale, zero_point), fusion = self.grid(), rounding.fusion()
        # By hand there is no gradient of the weight itself, nor of the zero point.
        if fusion is None or weight.requires_grad or zero_point.requires_grad:
            integers = self.integers(weight, rounding, scale, zero_point)
            return dequantize_affine(integers, scale, zero_point).flatten(1).to(weight.dtype)
        weight, rounding.last_penalty = fake_quantize(
            self.kernels,
            fusion,
            weight,
            scale,
            self.initial_scale,
            zero_point,
            (self.quant_min, self.quant_max),
            tuple(rounding.parameters()),
        )
        return weight

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` (O, I) rounded to nearest, its whole range covered, float32: as without any learning."""
        groups = to_groups(weight.float(), self.group_size)
        scale, zero_point = choose_qparams_affine(groups, self.bits, self.symmetric)
        scale = round_scale_ste(scale, self.scale_dtype)
        return fake_quantize_affine(groups, scale, zero_point, self.quant_min, self.quant_max).flatten(1)


class ActQuantizer(nn.Module):
    """Quantizes activations per token, each token's range found anew, times one learned multiplier.

    Args:
        bits: 2 to 8.
        symmetric: no zero point.
        denominator: see `choose_qparams_affine`.
        as_engine: as engines compute: no multiplier, signed integers, the zero point added before rounding.

    Attributes:
        clip_ratio: share of the range that preprocessing leaves, (); 1 at the start. Never learned.
        range_gradient: whether a gradient also reaches x through each token's range. Set by `gradients_through_ranges`.

    Source: S_X of Eq. 5 and 9; per-token granularity of section 5.1.
    Note: with a dynamic range there is no fixed step size to learn, so S_X is a multiplier on each token's step size,
        one a linear, starting at 1 (METHOD 4).
    """

    def __init__(
        self, bits: int, symmetric: bool = False, denominator: float | None = None, as_engine: bool = False
    ) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.denominator = denominator
        self.as_engine = as_engine
        self.quant_min = -(2 ** (bits - 1)) if as_engine else 0
        self.quant_max = self.quant_min + 2**bits - 1
        self.register_buffer("clip_ratio", torch.ones(()))
        self.range_multiplier = nn.Parameter(torch.ones(()))
        self.range_gradient = False
        self.kernels: Kernels = Blocked()

    @property
    def has_multiplier(self) -> bool:
        """Whether the range has a multiplier, learned or from preprocessing."""
        return not self.as_engine

    def set_range_(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Do nothing: each token brings its own range."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., T, I) quantized and dequantized, in its own dtype."""
        if not self.has_multiplier:
            return self.nearest(x)
        return self.quantize(x, self.clip_ratio * self.range_multiplier.clamp_min(SMALLEST_MULTIPLIER))

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., T, I) quantized with each token's full range, as without learning."""
        return self.quantize(x, torch.ones_like(self.range_multiplier))

    def qparams(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the zero point of each token of x (..., T, I), (..., T, 1)."""
        return choose_qparams_affine(x, self.bits, self.symmetric, self.denominator, self.quant_min)

    def quantize(self, x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        """Return x (..., T, I) quantized and dequantized with step sizes `multiplier` times those of its range."""
        with torch.set_grad_enabled(self.range_gradient and torch.is_grad_enabled()):
            scale, zero_point = self.qparams(x)
        # One row for each step size: a token, or all of a tensor.
        rows, scale = x.reshape(scale.numel(), -1), (scale * multiplier).view(-1, 1, 1)
        grid = scale, scale, zero_point.view(-1, 1, 1), (self.quant_min, self.quant_max)
        formula = ZERO_POINT_FIRST if self.as_engine else NEAREST
        return fake_quantize(self.kernels, Fusion(formula, NoLogits()), rows, *grid)[0].view_as(x)


class StaticActQuantizer(ActQuantizer):
    """Quantizes all activations of a linear's input with one step size, found on the calibration data.

    Its arguments are those of `ActQuantizer`; it has a multiplier always: engines store the product. `set_range_` must
    be called before it is used.

    Source: S_X of Eq. 5, read as one learned step size a linear (METHOD 4).
    """

    def __init__(
        self, bits: int, symmetric: bool = False, denominator: float | None = None, as_engine: bool = False
    ) -> None:
        super().__init__(bits, symmetric, denominator, as_engine)
        self.register_buffer("initial_scale", torch.tensor(float("nan")))
        self.register_buffer("zero_point", torch.tensor(float("nan")))

    @property
    def has_multiplier(self) -> bool:
        return True

    def set_range_(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Cover values from `low` () to `high` ()."""
        ends = torch.stack([low, high])
        scale, zero_point = choose_qparams_affine(ends, self.bits, self.symmetric, self.denominator, self.quant_min)
        self.initial_scale, self.zero_point = scale.squeeze(-1), zero_point.squeeze(-1)

    def qparams(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.initial_scale, self.zero_point

    @torch.no_grad()
    def learned_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the learned step size and the zero point of signed integers, () each, float32."""
        multiplier = self.clip_ratio * self.range_multiplier.clamp_min(SMALLEST_MULTIPLIER)
        return self.initial_scale * multiplier, self.zero_point - (self.quant_min + 2 ** (self.bits - 1))


def act_quantizers(modules: nn.Module | list[nn.Module]) -> list[ActQuantizer]:
    """Return every activation quantizer in or below `modules`, in order."""
    modules = [modules] if isinstance(modules, nn.Module) else modules
    return [child for module in modules for child in module.modules() if isinstance(child, ActQuantizer)]


def gradients_through_ranges(quantizers: Iterable[ActQuantizer], wanted: bool) -> AbstractContextManager[None]:
    """Let gradients also reach activations through each token's range, or not, and as before at the end."""
    return temporarily(quantizers, "range_gradient", wanted)


ACT_QUANTIZERS: dict[str, type[ActQuantizer]] = {"token": ActQuantizer, "tensor": StaticActQuantizer}
