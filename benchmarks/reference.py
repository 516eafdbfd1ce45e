"""Weight fake-quantization as a plain chain of torch operators under autograd: what the installed form is measured by.

Written out from the formulas and left alone: it stays what it is while `WeightQuantizer.forward` gets faster, and its
results are what the installed form's are compared with.

Shapes: O out_features, I in_features, G groups a row, g group size.
"""

from collections.abc import Callable

import torch

from cbq.quant.quantizer import WeightQuantizer
from cbq.quant.rounding import Rounding

ZETA, GAMMA = 1.1, -0.1
SMALLEST_MULTIPLIER = 0.05
Values = tuple[torch.Tensor, torch.Tensor | None]


class RoundStraightThrough(torch.autograd.Function):
    """Rounding with the identity as its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def straight_through(groups: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> Values:
    """Return round(W / s + clamp(offset)), (O, G, g)."""
    return RoundStraightThrough.apply(groups / scale + offset.view_as(groups).clamp(-0.5, 0.5)), None


def sigmoid(groups: torch.Tensor, initial_scale: torch.Tensor, logits: torch.Tensor, hard: bool) -> Values:
    """Return floor(W / s0) + Delta_W, rounded if hard, and Delta_W if soft, (O, G, g).

    Source: Eq. 8 around the point that gives the fraction of W / s0.
    """
    steps = groups / initial_scale
    low = steps.floor()
    p = (steps - low - GAMMA) / (ZETA - GAMMA)
    odds = torch.exp((-logits.view_as(groups)).clamp_max(80))
    values = (p / (p + (1 - p) * odds) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    return (RoundStraightThrough.apply(low + values), None) if hard else (low + values, values)


def nearest_values(groups: torch.Tensor, first: torch.Tensor, scale: torch.Tensor, rounding: Rounding) -> Values:
    return RoundStraightThrough.apply(groups / scale), None


def lora_ste_values(groups: torch.Tensor, first: torch.Tensor, scale: torch.Tensor, rounding: Rounding) -> Values:
    return straight_through(groups, scale, rounding.a1 @ rounding.a2)


def dense_ste_values(groups: torch.Tensor, first: torch.Tensor, scale: torch.Tensor, rounding: Rounding) -> Values:
    return straight_through(groups, scale, rounding.offset_values)


def lora_values(groups: torch.Tensor, first: torch.Tensor, scale: torch.Tensor, rounding: Rounding) -> Values:
    return sigmoid(groups, first, rounding.a1 @ rounding.a2, rounding.hard)


def adaround_values(groups: torch.Tensor, first: torch.Tensor, scale: torch.Tensor, rounding: Rounding) -> Values:
    return sigmoid(groups, first, rounding.logits, rounding.hard)


VALUES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rounding], Values]] = {
    "nearest": nearest_values,
    "lora_ste": lora_ste_values,
    "dense_ste": dense_ste_values,
    "lora": lora_values,
    "adaround": adaround_values,
}


def fake_quantize(
    kind: str, quantizer: WeightQuantizer, weight: torch.Tensor, rounding: Rounding, beta: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the fake-quantized weight (O, I), float32, and the compensation loss of a soft rounding.

    Args:
        kind: of the rounding.
        quantizer: only its tensors and its range are read.
        weight: (O, I).
        rounding: only its parameters, and whether it is hard, are read.
        beta: of Eq. 12.
    """
    scale = quantizer.initial_scale * quantizer.step_size.multiplier.clamp_min(SMALLEST_MULTIPLIER)
    groups = weight.float().unflatten(-1, (scale.shape[1], -1))
    with torch.autocast(weight.device.type, enabled=False):
        values, soft = VALUES[kind](groups, quantizer.initial_scale, scale, rounding)
    integers = (values + quantizer.zero_point).clamp(quantizer.quant_min, quantizer.quant_max)
    quantized = ((integers - quantizer.zero_point) * scale).flatten(1)
    return quantized, None if soft is None else (1 - (2 * soft - 1).abs().pow(beta)).mean()
