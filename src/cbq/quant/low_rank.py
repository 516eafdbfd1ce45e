"""The low-rank matrix that LoRA-Rounding learns in the place of one logit a weight.

Shapes: O out_features, I in_features, R rank.
"""

import math

import torch
from torch import nn

from cbq.errors import InputError


def low_rank_factors(out_features: int, in_features: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return A_1 (O, R), Gaussian, and A_2 (R, I), zero, so that A_1 A_2 starts at zero.

    Raises:
        InputError: rank is not an integer of at least 1.

    Source: Eq. 11.
    Note: the paper prints no variance. 1 / R keeps the size of A_1 A_2 independent of the rank.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"rounding.rank must be an integer of at least 1, got {rank!r}")
    rank = min(rank, out_features, in_features)
    return (
        nn.Parameter(torch.randn(out_features, rank) / math.sqrt(rank)),
        nn.Parameter(torch.zeros(rank, in_features)),
    )


def low_rank_product(a1: torch.Tensor, a2: torch.Tensor) -> torch.Tensor:
    """Return A_1 A_2 in float32, also where other matrix products are in bfloat16: integers must not depend on that."""
    with torch.autocast(a1.device.type, enabled=False):
        return a1 @ a2
