"""Exact second derivatives of the language-modelling loss at a quantized model (paper section 2, Eq. 3, Figure 1).

What is differentiated. Rounding is a staircase: its derivative is 0 almost everywhere and does not exist at the steps,
so "the Hessian of the quantized loss" needs a reading. Ours: *every rounding decision is frozen* at the point where the
Hessian is taken.

- A rounded weight is s (q - z) with its integers q and zero points z constant. With respect to its step size s, or a
  multiplier on it, that is linear, and equal to the true function on the whole piece between two jumps of the integers:
  where the true second derivative exists, this is it. With respect to the weights, the derivative is taken at the
  dequantized weight: how much the loss would bend if this stored value were another.
- A rounded activation is x + (Q(x) - x) with the rounding error in brackets constant: the gradient passes through, as
  straight-through estimators have it. With 16-bit activations there is no bracket and nothing is approximated.

So the function is smooth, automatic differentiation through it twice is exact, and finite differences of it agree.

Scales are differentiated as multipliers, one a block, on all weight step sizes of the block, at 1: H_ij is in nats a
token for relative changes of both, which makes bit widths comparable; that with respect to the step sizes themselves is
H_ij / (s_i s_j).

Shapes: N segments, B batch, T tokens, L blocks, n chosen weights, O out_features, I in_features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from cbq.models.loading import PreTrainedModel
from cbq.quant.linear import QuantLinear, quant_linears


@contextmanager
def removed(hooks: list[RemovableHandle]) -> Iterator[None]:
    """Take hooks away at the end."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def frozen_rounding(blocks: nn.ModuleList | list[nn.Module]) -> Iterator[None]:
    """Let linears compute with rounded weights and inputs whose rounding errors are constants.

    Args:
        blocks: their linears in the full-precision state.
    """
    linears = quant_linears(blocks)
    weights = [linear.weight for linear in linears]
    hooks = [linear.register_forward_pre_hook(freeze_input) for linear in linears if linear.act_quantizer]
    with removed(hooks):
        try:
            for linear in linears:
                if linear.weight_quantizer:
                    rounded = linear.weight_quantizer.nearest(linear.weight).to(linear.weight.dtype)
                    linear.weight = nn.Parameter(rounded, requires_grad=False)
            yield
        finally:
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight = weight


def freeze_input(linear: QuantLinear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Return the input (..., T, I) of a linear with its rounding error added as a constant."""
    (x,) = args
    with torch.no_grad():
        error = linear.act_quantizer.nearest(x) - x
    return (x + error,)


def mean_nll(model: PreTrainedModel, segments: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log likelihood, in nats, of segments (B, T) after their first token; differentiable."""
    logits = model(input_ids=segments, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), segments[:, 1:].flatten())


def mean_hessian(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], point: torch.Tensor, segments: torch.Tensor
) -> torch.Tensor:
    """Return the mean over segments of a loss's exact Hessian, by one Hessian-vector product a row.

    Args:
        loss: of a point (n,) and one segment (1, T); ().
        point: where, (n,).
        segments: token ids, (N, T).

    Returns:
        (n, n), symmetric.
    """
    total = torch.zeros(len(point), len(point), dtype=point.dtype, device=point.device)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        for segment in segments.split(1):
            total += hessian(lambda p, segment=segment: loss(p, segment), point)
    total /= len(segments)
    return (total + total.T) / 2  # they differ in the last digits


def scale_hessian(model: PreTrainedModel, blocks: nn.ModuleList, segments: torch.Tensor) -> torch.Tensor:
    """Return the Hessian of the loss with respect to a multiplier on every weight step size of a block, at 1.

    Args:
        model: its block linears in the full-precision state.
        blocks: L of them.
        segments: token ids on the model's device, (N, T).

    Returns:
        (L, L), nats a token.

    Source: Eq. 3 and Figure 1 (b).
    """

    def loss(multipliers: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        # m (W x) = W (m x): scaling inputs needs no second copy of the weights.
        hooks = [
            linear.register_forward_pre_hook(lambda linear, args, index=index: (args[0] * multipliers[index],))
            for index, block in enumerate(blocks)
            for linear in quant_linears(block)
            if linear.weight_quantizer
        ]
        with removed(hooks):
            return mean_nll(model, segment)

    with frozen_rounding(blocks):
        return mean_hessian(loss, torch.ones(len(blocks), dtype=model.dtype, device=segments.device), segments)


def weight_hessian(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    linear: QuantLinear,
    rows: list[int],
    columns: list[int],
    segments: torch.Tensor,
) -> torch.Tensor:
    """Return the Hessian of the loss with respect to some weights of one linear, at their dequantized values.

    Args:
        model: its block linears in the full-precision state.
        blocks: all of its blocks.
        linear: one of theirs.
        rows: of its weight (O, I): the output channels of the weights.
        columns: their input channels.
        segments: token ids on the model's device, (N, T).

    Returns:
        (n, n) for the n = len(rows) * len(columns) weights, row by row; nats a token per weight squared.

    Source: Eq. 3 and Figure 1 (a).
    """
    outputs = torch.tensor(rows, device=segments.device)

    def loss(offsets: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        # (W + D) x = W x + D x, where D is 0 but for the chosen weights.
        def add(linear: QuantLinear, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            return output.index_add(-1, outputs, args[0][..., columns] @ offsets.view(len(rows), len(columns)).T)

        with removed([linear.register_forward_hook(add)]):
            return mean_nll(model, segment)

    with frozen_rounding(blocks):
        point = torch.zeros(len(rows) * len(columns), dtype=model.dtype, device=segments.device)
        return mean_hessian(loss, point, segments)
