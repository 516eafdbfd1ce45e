"""Linears that compute in full precision, rounded to nearest, or with what was learned; and their finished form.

Shapes: O out_features, I in_features, G groups a row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from cbq.errors import InputError
from cbq.quant.affine import dequantize_affine, to_groups
from cbq.quant.quantizer import ACT_QUANTIZERS, ActQuantizer, WeightQuantizer
from cbq.quant.rounding import Nearest, Rounding
from cbq.quant.scheme import SCALE_BITS, QuantScheme
from cbq.quant.state import Quantized, QuantState, quantized_modules


def make_act_quantizer(scheme: QuantScheme) -> ActQuantizer:
    """Return the activation quantizer of a linear of `scheme`."""
    kind = ACT_QUANTIZERS[scheme.act_granularity]
    return kind(scheme.act_bits, scheme.act_symmetric, scheme.act_denominator, scheme.engine_activations)


Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def bias_apart(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x (..., I) times the weight (O, I), rounded to its type, and then plus the bias (O,), (..., O)."""
    return F.linear(x, weight) if bias is None else F.linear(x, weight) + bias


def product_of(linear: nn.Linear) -> Product:
    """Return how `linear` multiplies: a class of its own (Falcon's) adds the bias to what is rounded already."""
    return F.linear if type(linear).forward is nn.Linear.forward else bias_apart


class QuantLinear(Quantized):
    """A linear whose weight and input can be quantized.

    Full precision is a state, not a second copy of the weight; in it the output is bit-equal to `linear`'s.

    Args:
        linear: its weight and bias are shared, not copied.
        scheme: bits and granularity; its overrides are not looked at.

    Attributes:
        rounding: how the weight is rounded in the learned state. `Nearest` until a solver puts its own there.
    """

    def __init__(self, linear: nn.Linear, scheme: QuantScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.product = linear.weight, linear.bias, product_of(linear)
        self.weight_quantizer: WeightQuantizer | None = None
        self.act_quantizer: ActQuantizer | None = None
        if scheme.quantizes_weights:
            dtype = linear.weight.dtype if scheme.scale_dtype == "weight" else getattr(torch, scheme.scale_dtype)
            self.weight_quantizer = WeightQuantizer(
                linear.weight, scheme.weight_bits, scheme.group_size, scheme.symmetric, dtype
            )
        if scheme.quantizes_activations:
            self.act_quantizer = make_act_quantizer(scheme)
        self.rounding: Rounding = Nearest(self.out_features, self.in_features)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., I) times the weight plus the bias, (..., O)."""
        weight = self.weight
        if self.state is QuantState.NEAREST:
            x = self.act_quantizer.nearest(x) if self.act_quantizer else x
            weight = self.weight_quantizer.nearest(weight).to(weight.dtype) if self.weight_quantizer else weight
        elif self.state is QuantState.LEARNED:
            x = self.act_quantizer(x) if self.act_quantizer else x
            weight = self.weight_quantizer(weight, self.rounding).to(weight.dtype) if self.weight_quantizer else weight
        return self.product(x, weight, self.bias)

    @torch.no_grad()
    def integers(self) -> torch.Tensor | None:
        """Return the learned integers, (O, I) uint8, or None where the weight is not quantized."""
        if self.weight_quantizer is None:
            return None
        integers = self.weight_quantizer.integers(self.weight, self.rounding, *self.weight_quantizer.grid())
        return integers.round().to(torch.uint8).flatten(1)

    @torch.no_grad()
    def changed_integers(self) -> tuple[int, int]:
        """Return how many learned integers differ from round-to-nearest at the initial scale, and of how many."""
        if self.weight_quantizer is None:
            return 0, 0
        return int(self.rounding_counts()[1]), self.weight.numel()

    @torch.no_grad()
    def rounding_counts(self) -> torch.Tensor:
        """Return how many values are rounded hard, and how many integers differ from round-to-nearest at the initial
        scale, (2,), on the device; the weight must be quantized."""
        quantizer = self.weight_quantizer
        scale, zero_point = quantizer.grid()
        groups = to_groups(self.weight.float(), quantizer.group_size)
        values = self.rounding(groups, quantizer.initial_scale, scale)
        integers = (values + zero_point).clamp(quantizer.quant_min, quantizer.quant_max).round()
        changed = integers != quantizer.starting_integers(self.weight)
        return torch.stack([(values == values.round()).sum(), changed.sum()])

    @torch.no_grad()
    def relative_error(self) -> torch.Tensor:
        """Return what rounding does to the weight, |W_q - W|^2 / |W|^2, (), on the device; it must be quantized."""
        weight = self.weight.float()
        change = self.weight_quantizer(self.weight, self.rounding).float() - weight
        return change.square().sum() / weight.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


class FusedLinear(nn.Module):
    """A finished quantized linear: the integers, and the weight that they stand for.

    Args:
        scheme: bits and granularity.
        integers: (O, I), uint8, or None where the weight is not quantized.
        weight_scale: (O, G), float32, or None likewise.
        zero_point: (O, G), uint8, or None likewise.
        weight: (O, I). Replaced by what the integers stand for, in its dtype; kept where the weight is not quantized.
        bias: (O,) or None.
        act_quantizer: quantizes the input, or None.
        product: how the linear that it stands for multiplies (`product_of`).
    """

    def __init__(
        self,
        scheme: QuantScheme,
        integers: torch.Tensor | None,
        weight_scale: torch.Tensor | None,
        zero_point: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        act_quantizer: ActQuantizer | None,
        product: Product = F.linear,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.out_features, self.in_features = weight.shape
        self.register_buffer("integers", integers)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("zero_point", zero_point)
        if integers is not None:
            groups = to_groups(integers.float(), self.in_features // weight_scale.shape[1])
            dequantized = dequantize_affine(groups, weight_scale.unsqueeze(-1), zero_point.float().unsqueeze(-1))
            weight = dequantized.flatten(1).to(weight.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias, self.product = bias, product
        self.act_quantizer = act_quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (..., I), quantized, times the weight plus the bias, (..., O)."""
        return self.product(self.act_quantizer(x) if self.act_quantizer else x, self.weight, self.bias)


def quantize_linears_(blocks: nn.ModuleList, scheme: QuantScheme) -> None:
    """Replace every `nn.Linear` of `blocks` by a `QuantLinear` in the full-precision state.

    Raises:
        InputError: a group size does not divide a linear's input features, an override matches no linear, or there is
            no linear. The blocks are then unchanged.
    """
    quantized: list[tuple[nn.Module, str, QuantLinear]] = []
    used: set[int] = set()
    example = ""
    for index, block in enumerate(blocks):
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                names = [f"blocks.{number}.{name}" for number in (index, index - len(blocks))]
                used |= set(scheme.matching(names))
                example = example or names[0]
                quantized.append((block, name, QuantLinear(linear, scheme.of_linear(names))))
    if not quantized:
        raise InputError("the model's blocks hold no linear to quantize: it is quantized already")
    for number, override in enumerate(scheme.overrides):
        if number not in used:
            raise InputError(
                f"quant.overrides: {override['linears']!r} is the name of no linear; names are like {example}"
            )
    for block, name, linear in quantized:
        block.set_submodule(name, linear)


@torch.no_grad()
def fuse(linear: QuantLinear) -> FusedLinear:
    """Return the finished form of `linear`; its rounding must be hard."""
    scale, zero_point = linear.weight_quantizer.grid() if linear.weight_quantizer else (None, None)
    return FusedLinear(
        scheme=linear.scheme,
        integers=linear.integers(),
        weight_scale=None if scale is None else scale.squeeze(-1).clone(),
        zero_point=None if zero_point is None else zero_point.squeeze(-1).to(torch.uint8),
        weight=linear.weight.detach(),
        bias=linear.bias,
        act_quantizer=linear.act_quantizer,
        product=linear.product,
    )


def fuse_linears_(module: nn.Module) -> None:
    """Replace every `QuantLinear` below `module` by its `FusedLinear`."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantLinear):
                setattr(parent, name, fuse(child))


def effective_bits(model: nn.Module) -> float:
    """Return the bits stored a weight of the fused linears: integers, 16-bit scales, zero points where they vary."""
    bits, weights = 0, 0
    for _, linear in fused_linears(model):
        weights += linear.weight.numel()
        bits += linear.weight.numel() * linear.scheme.weight_bits
        if linear.integers is not None:
            zero_point_bits = 0 if linear.scheme.symmetric else linear.scheme.weight_bits
            bits += linear.weight_scale.numel() * (SCALE_BITS + zero_point_bits)
    return bits / weights


def quant_linears(modules: nn.Module | list[nn.Module]) -> list[QuantLinear]:
    """Return every `QuantLinear` below `modules`, in order."""
    return [module for module in quantized_modules(modules) if isinstance(module, QuantLinear)]


def fused_linears(model: nn.Module) -> list[tuple[str, FusedLinear]]:
    """Return every fused linear of a model with its qualified name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, FusedLinear)]
