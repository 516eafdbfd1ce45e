"""Fake quantization as one pass each way, with gradients by hand: its place in autograd.

Shapes: R rows, I features a row, G groups a row, g group size (G * g = I).
"""

import torch

from cbq.quant.formulas import Grid
from cbq.quant.kernels import Kernels
from cbq.quant.logits import Fusion


class _FakeQuantize(torch.autograd.Function):
    """Keeps x (which it shares), the parameters and the grid; nothing else of a tensor's size."""

    @staticmethod
    def forward(ctx, kernels, fusion, quant_min, quant_max, x, scale, initial_scale, zero_point, *parameters):
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.fusion, ctx.range = kernels, fusion, (quant_min, quant_max)
        ctx.save_for_backward(x, scale, initial_scale, zero_point, *parameters)
        grid = Grid(scale, initial_scale, zero_point, quant_min, quant_max)
        with torch.autocast(x.device.type, enabled=False):  # integers must not depend on it
            values, penalty = kernels.forward(fusion, x, grid, parameters)
        return values, None if penalty is None else penalty / x.numel()

    @staticmethod
    def backward(ctx, gradient, penalty_gradient):
        x, scale, initial_scale, zero_point, *parameters = ctx.saved_tensors
        if gradient is None:
            if penalty_gradient is None:
                return (None,) * (8 + len(parameters))
            gradient = torch.zeros_like(x)
        if penalty_gradient is not None:
            penalty_gradient = penalty_gradient / x.numel()
        grid, parameters = Grid(scale, initial_scale, zero_point, *ctx.range), tuple(parameters)
        parameter_gradients = (None,) * len(parameters)
        with torch.autocast(x.device.type, enabled=False):
            scale_gradient, row_gradient = ctx.kernels.backward(
                ctx.fusion, gradient, penalty_gradient, x, grid, parameters
            )
            if any(ctx.needs_input_grad[8:]):
                parameter_gradients = ctx.fusion.source.gradients(parameters, row_gradient)
        x_gradient = row_gradient if ctx.needs_input_grad[4] else None
        return None, None, None, None, x_gradient, scale_gradient, None, None, *parameter_gradients


def fake_quantize(
    kernels: Kernels,
    fusion: Fusion,
    x: torch.Tensor,
    scale: torch.Tensor,
    initial_scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_range: tuple[int, int],
    parameters: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Quantize and dequantize in one pass, with gradients by hand.

    Args:
        kernels: what runs it.
        fusion: what is computed.
        x: (R, I), any float dtype. Only the formula `NEAREST` gives its gradient.
        scale: (R, G, 1), differentiable.
        initial_scale: (R, G, 1).
        zero_point: (R, G, 1).
        quant_range: smallest and largest integer.
        parameters: of the fusion's source, differentiable.

    Returns:
        x quantized, (R, I) in its dtype; the mean of Eq. 12 over its elements, (), or None without a beta.
    """
    return _FakeQuantize.apply(kernels, fusion, *quant_range, x, scale, initial_scale, zero_point, *parameters)
