"""Whether tensors that were read from a file are what a quantized linear is made of.

Shapes: O out_features, I in_features, G groups a row.
"""

import torch

from cbq.quant.affine import quant_range
from cbq.quant.scheme import QuantScheme


def check_stored_weight(
    scheme: QuantScheme,
    shape: torch.Size,
    integers: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor,
) -> None:
    """Refuse a weight that its scheme does not describe: torch would broadcast or cast what does not fit.

    Args:
        scheme: of the linear.
        shape: (O, I).
        integers: (O, I) uint8.
        weight_scale: (O, G) float32, positive.
        zero_point: (O, G) uint8.

    Raises:
        ValueError: one has another shape, another dtype, or values out of range.

    Example:
        >>> parts = torch.full((2, 4), 9, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8)
        >>> check_stored_weight(QuantScheme(4, 16), torch.Size([2, 4]), *parts)
        >>> check_stored_weight(QuantScheme(2, 16), torch.Size([2, 4]), *parts)
        Traceback (most recent call last):
        ValueError: integers must be 0 to 3, got 9
    """
    out_features, in_features = shape
    group_size = in_features if scheme.group_size == -1 else scheme.group_size
    grid = (out_features, -(-in_features // group_size))
    for name, tensor, wanted, dtype in (
        ("integers", integers, tuple(shape), torch.uint8),
        ("weight_scale", weight_scale, grid, torch.float32),
        ("zero_point", zero_point, grid, torch.uint8),
    ):
        if tuple(tensor.shape) != wanted or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {wanted} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
    quant_max = quant_range(scheme.weight_bits)[1]
    for name, tensor in (("integers", integers), ("zero_point", zero_point)):
        if tensor.max() > quant_max:
            raise ValueError(f"{name} must be 0 to {quant_max}, got {tensor.max()}")
    if not (weight_scale.isfinite() & (weight_scale > 0)).all():
        raise ValueError("weight_scale must be finite and above 0")


def check_stored_number(value: torch.Tensor) -> None:
    """Refuse what is no finite floating-point number.

    Raises:
        ValueError: it has dimensions, or another dtype, or is not finite.
    """
    if value.dim() or not value.is_floating_point() or not value.isfinite():
        raise ValueError(f"a number must be a finite float, got {value.dtype} {tuple(value.shape)}")
