"""Uniform affine quantization: a real value x is stored as an integer q and read back as (q - zero_point) * scale.

Integers are unsigned, 0 to 2^bits - 1, also for symmetric quantization, whose zero point is the constant 2^(bits - 1):
one formula serves both.

Shapes: O out_features, I in_features, G groups a row, g group size (G * g = I).
"""

import torch

SMALLEST_SCALE = 1e-9  # a constant-zero group has no range: any positive scale represents it exactly


def quant_range(bits: int) -> tuple[int, int]:
    """Return the smallest and largest integer of `bits` bits.

    Example:
        >>> quant_range(4)
        (0, 15)
    """
    return 0, 2**bits - 1


def to_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return a weight (O, I) as groups (O, G, g); `group_size` -1 means one group a row.

    Example:
        >>> to_groups(torch.zeros(2, 6), 3).shape
        torch.Size([2, 2, 3])
    """
    return weight.unflatten(-1, (-1, weight.shape[-1] if group_size == -1 else group_size))


def choose_qparams_affine(
    values: torch.Tensor, bits: int, symmetric: bool, denominator: float | None = None, quant_min: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and zero point that cover the range of `values` over its last dimension.

    The range always contains 0, so that 0 is exact.

    Args:
        values: (..., g), any real values.
        bits: 2 to 8.
        symmetric: the range is [-absmax, absmax] and the zero point 2^(bits - 1); otherwise [min, max].
        denominator: symmetric only: absmax / denominator is the scale. Engines differ between 2^(bits - 1) - 0.5
            (the default, which uses every integer) and 2^(bits - 1) - 1.
        quant_min: smallest integer; engines count from -2^(bits - 1).

    Returns:
        scale and zero_point, (..., 1) each, float32; zero_point holds integers.

    Example:
        >>> scale, zero_point = choose_qparams_affine(torch.tensor([[-1.0, 0.0, 2.0]]), bits=2, symmetric=False)
        >>> scale.item(), zero_point.item()
        (1.0, 1.0)
        >>> choose_qparams_affine(torch.tensor([[-1.5, 0.5]]), bits=2, symmetric=True)[0].item()
        1.0
    """
    steps = 2**bits - 1
    # Not aminmax: over a dimension it is nine times as slow as the two together on a CPU. Both ends are exact in every
    # dtype: no copy in float32 is made, or kept for a gradient.
    low, high = (end.float() for end in (values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)))
    if symmetric:
        largest = torch.maximum(-low, high)
        scale = (largest / (denominator or steps / 2)).clamp_min(SMALLEST_SCALE)
        return scale, torch.full_like(scale, quant_min + 2 ** (bits - 1))
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / steps).clamp_min(SMALLEST_SCALE)
    return scale, (quant_min - low / scale).clamp(quant_min, quant_min + steps).round()


class _RoundSTE(torch.autograd.Function):
    """Rounding whose gradient is the identity: one pass each way, no temporary tensors."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def round_ste(x: torch.Tensor) -> torch.Tensor:
    """Round half to even; the gradient passes straight through.

    Example:
        >>> x = torch.tensor([0.4, 0.6], requires_grad=True)
        >>> round_ste(x).sum().backward()
        >>> x.grad
        tensor([1., 1.])
    """
    return _RoundSTE.apply(x)


class _RoundToDtypeSTE(torch.autograd.Function):
    """Rounding to a narrower type whose gradient is the identity."""

    @staticmethod
    def forward(ctx, x, dtype):
        limits = torch.finfo(dtype)
        smallest = limits.smallest_normal * limits.eps
        return x.clamp(smallest, limits.max).to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def round_scale_ste(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return positive scales that `dtype` can hold, positive still, in their own dtype; the gradient passes through.

    Example:
        >>> round_scale_ste(torch.tensor([0.1, 1e-9]), torch.float16)
        tensor([9.9976e-02, 5.9605e-08])
    """
    return scale if dtype == scale.dtype else _RoundToDtypeSTE.apply(scale, dtype)


def quantize_affine(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """Return the integers of `x` as floats, differentiable by the straight-through estimator.

    Example:
        >>> quantize_affine(torch.tensor([-1.0, 0.6, 9.0]), torch.tensor(1.0), torch.tensor(1.0), 0, 3)
        tensor([0., 2., 3.])
    """
    return (round_ste(x / scale) + zero_point).clamp(quant_min, quant_max)


def dequantize_affine(integers: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Return (integers - zero_point) * scale.

    Example:
        >>> dequantize_affine(torch.tensor([0.0, 3.0]), torch.tensor(0.5), torch.tensor(1.0))
        tensor([-0.5000,  1.0000])
    """
    return (integers - zero_point) * scale


def fake_quantize_affine(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """Quantize and dequantize. Gradients reach `x` and `scale`.

    Example:
        >>> fake_quantize_affine(torch.tensor([0.3, 0.4]), torch.tensor(0.5), torch.tensor(0.0), 0, 3)
        tensor([0.5000, 0.5000])
    """
    return dequantize_affine(quantize_affine(x, scale, zero_point, quant_min, quant_max), scale, zero_point)
