"""Weight and activation fake-quantization, written out: the values, and their gradients by hand.

A formula is two pure functions of a few rows. Neither keeps anything: the backward computes the forward again, so that
rounding logits and everything of a weight's size between its input and its output need no memory. In plain autograd
every operation of the chain keeps a tensor.

They compute what the chain of `affine` and `rounding` computes, operation by operation and in that order, and therefore
to the bit; operations work in place on what they own. A mask is a float that is compared in place (`x.eq_(clipped)`,
1 where the clipping left x alone): on a CPU five times as fast as `where` and a truth value.

Shapes: R rows (out_features of a weight, tokens of an activation), G groups a row, g group size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch

ZETA = 1.1
GAMMA = -0.1


class Grid(NamedTuple):
    """The quantization grid of some rows.

    Args:
        scale: (R, G, 1), the learned one.
        initial_scale: (R, G, 1), before learning.
        zero_point: (R, G, 1).
        quant_min: smallest integer.
        quant_max: largest integer.
    """

    scale: torch.Tensor
    initial_scale: torch.Tensor
    zero_point: torch.Tensor
    quant_min: int
    quant_max: int

    def rows(self, rows: slice) -> "Grid":
        """Return the grid of some of the rows."""
        return Grid(self.scale[rows], self.initial_scale[rows], self.zero_point[rows], self.quant_min, self.quant_max)


@dataclass(frozen=True)
class Formula:
    """One kind of fake quantization.

    Args:
        forward: of (groups, logits, grid, beta, out): writes the values, (R, G, g), to out; returns the sum of
            1 - |2 Delta_W - 1|^beta over them, or None without a beta.
        backward: of (gradient, penalty_gradient, groups, logits, grid, beta, out): writes the gradient of the logits,
            or of the groups where these are learned, (R, G, g), to out; returns that of the scale, (R, G, 1).
            `gradient` is that of the values; `penalty_gradient` is () and belongs to the sum above.

    `groups` and `logits` are (R, G, g), or logits None for a kind without. They are not changed.
    """

    forward: Callable[..., torch.Tensor | None]
    backward: Callable[..., torch.Tensor]


def dequantize(integers: torch.Tensor, grid: Grid, out: torch.Tensor) -> None:
    """Write the values of integers less the zero point, not clipped yet, (R, G, g), to `out`; spoils `integers`."""
    integers.add_(grid.zero_point).clamp_(grid.quant_min, grid.quant_max).sub_(grid.zero_point)
    torch.mul(integers, grid.scale, out=out)


def dequantize_backward(
    gradient: torch.Tensor, integers: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of the scale as a factor, (R, G, 1), and of the integers, (R, G, g); spoils `integers`."""
    unclipped = integers.add_(grid.zero_point)
    clipped = unclipped.clamp(grid.quant_min, grid.quant_max)
    inside = unclipped.eq_(clipped)
    scale_gradient = clipped.sub_(grid.zero_point).mul_(gradient).sum(-1, keepdim=True)
    return scale_gradient, torch.mul(gradient, grid.scale, out=clipped).mul_(inside)


def straight_through_forward(groups, logits, grid, beta, out, limit=0.5):
    """round(W / s + clip(V)), on the grid of s."""
    steps = groups / grid.scale
    if logits is not None:
        steps.add_(logits.clamp(-limit, limit))
    dequantize(steps.round_(), grid, out)


def straight_through_backward(gradient, penalty_gradient, groups, logits, grid, beta, out, limit=0.5):
    """The gradient passes through round; W / s depends on s too."""
    steps = groups / grid.scale
    offset = logits.clamp(-limit, limit)
    scale_gradient, steps_gradient = dequantize_backward(gradient, (steps + offset).round_(), grid)
    torch.mul(steps_gradient, offset.eq_(logits), out=out)
    return scale_gradient.sub_(steps.div_(grid.scale).mul_(steps_gradient).sum(-1, keepdim=True))


def zero_point_first_forward(groups, logits, grid, beta, out):
    """round(x / s + z), as engines compute it: at ties, and in the last digit, not always round(x / s) + z."""
    steps = (groups / grid.scale).add_(grid.zero_point).round_().clamp_(grid.quant_min, grid.quant_max)
    torch.mul(steps.sub_(grid.zero_point), grid.scale, out=out)


def nearest_backward(gradient, penalty_gradient, groups, logits, grid, beta, out):
    """Without logits: the gradient of what is quantized itself."""
    steps = groups / grid.scale
    scale_gradient, steps_gradient = dequantize_backward(gradient, steps.round(), grid)
    torch.div(steps_gradient, grid.scale, out=out)
    return scale_gradient.sub_(steps.div_(grid.scale).mul_(steps_gradient).sum(-1, keepdim=True))


def sigmoid_parts(groups, logits, grid):
    """Return floor(W / s0); the parts p, t = exp(-V) and p + (1 - p) t of Eq. 8; and its value before clipping."""
    steps = groups / grid.initial_scale
    low = steps.floor()
    p = steps.sub_(low).sub_(GAMMA).div_(ZETA - GAMMA)
    t = logits.neg().clamp_max_(80).exp_()
    denominator = (1 - p).mul_(t).add_(p)
    unclipped = p.div(denominator).mul_(ZETA - GAMMA).add_(GAMMA)
    return low, p, t, denominator, unclipped


def soft_forward(groups, logits, grid, beta, out):
    """floor(W / s0) + Delta_W, and Eq. 12."""
    low, *_, values = sigmoid_parts(groups, logits, grid)
    dequantize(low.add_(values.clamp_(0, 1)), grid, out)
    return None if beta is None else (1 - values.mul_(2).sub_(1).abs_().pow(beta)).sum()


def hard_forward(groups, logits, grid, beta, out):
    """round(floor(W / s0) + Delta_W)."""
    low, *_, values = sigmoid_parts(groups, logits, grid)
    dequantize(low.add_(values.clamp_(0, 1)).round_(), grid, out)


def soft_backward(gradient, penalty_gradient, groups, logits, grid, beta, out):
    """The gradients of `soft_forward`."""
    low, p, t, denominator, unclipped = sigmoid_parts(groups, logits, grid)
    values = unclipped.clamp(0, 1)
    scale_gradient, values_gradient = dequantize_backward(gradient, low.add_(values), grid)
    if penalty_gradient is not None:
        values_gradient.add_(penalty_backward(penalty_gradient, values, beta))
    sigmoid_backward(values_gradient, values, p, t, denominator, unclipped, out)
    return scale_gradient


def hard_backward(gradient, penalty_gradient, groups, logits, grid, beta, out):
    """The gradients of `hard_forward`: round passes them on."""
    low, p, t, denominator, unclipped = sigmoid_parts(groups, logits, grid)
    values = unclipped.clamp(0, 1)
    scale_gradient, values_gradient = dequantize_backward(gradient, low.add_(values).round_(), grid)
    sigmoid_backward(values_gradient, values, p, t, denominator, unclipped, out)
    return scale_gradient


def sigmoid_backward(gradient, values, p, t, denominator, unclipped, out):
    """Write the gradient of V for that of Delta_W to `out`; all arguments are spoilt."""
    gradient.mul_(values.eq_(unclipped)).mul_(ZETA - GAMMA)
    ratio = torch.div(p, denominator, out=unclipped).div_(denominator)
    torch.mul(gradient.mul_(ratio).mul_(p.neg_().add_(1)), t, out=out)


def penalty_backward(penalty_gradient, values, beta):
    """Return the gradient of Delta_W by Eq. 12; `values` are not changed."""
    distance = (2 * values).sub_(1)
    gradient = distance.abs().pow_(beta - 1).mul_(beta).mul_(-penalty_gradient)
    return gradient.mul_(distance.sgn_()).mul_(2)


NEAREST = Formula(straight_through_forward, nearest_backward)  # of weights without a learned rounding, and of inputs
ZERO_POINT_FIRST = Formula(zero_point_first_forward, nearest_backward)  # of inputs
SOFT_SIGMOID = Formula(soft_forward, soft_backward)
HARD_SIGMOID = Formula(hard_forward, hard_backward)


@cache
def straight_through(limit: float) -> Formula:
    """Return the formula of an offset of at most `limit`; the same object every time, which is compiled once."""
    return Formula(partial(straight_through_forward, limit=limit), partial(straight_through_backward, limit=limit))
