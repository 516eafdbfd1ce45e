"""Which of many values are outliers (paper section 3.4 and Algorithm 1): tensors only.

Shapes: R rows, each searched on its own; n values a row.
"""

from collections.abc import Callable

import torch


def coarse_threshold(ordered: torch.Tensor, lambda1: float) -> torch.Tensor:
    """Return T = Q3 + lambda1 * (Q3 - Q1) of each row.

    Args:
        ordered: (R, n), ascending along each row.
        lambda1: interquartile ranges above the upper quartile; the paper's is 1.5.

    Returns:
        (R, 1).

    Example:
        >>> coarse_threshold(torch.arange(8.0)[None], lambda1=1.5)
        tensor([[12.]])

    Source: lines 2-5 of Algorithm 1.
    """
    n = ordered.shape[-1]
    first, third = ordered[:, n // 4, None], ordered[:, min(3 * n // 4, n - 1), None]
    return third + lambda1 * (third - first)


def reserve_all(coarse: torch.Tensor) -> torch.Tensor:
    """Return where the reserved set begins: at the smallest value, so that it is everything that is no outlier.

    Args:
        coarse: (R, n), whether a value is in the coarse set.
    """
    return torch.zeros_like(coarse[:, :1], dtype=torch.long)


def reserve_coarse(coarse: torch.Tensor) -> torch.Tensor:
    """Return where the reserved set begins: at the first value of the coarse set, as Algorithm 1 prints it.

    Note: the variance of one value is 0, so the split falls close to T whatever the distribution: a Gaussian loses
        its largest 1.5 % (METHOD 7).
    """
    return (~coarse).sum(-1, keepdim=True)


RESERVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"all": reserve_all, "coarse": reserve_coarse}


def running_sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of the first 0, 1, ..., n values of each row (R, n), (R, n + 1).

    Example:
        >>> running_sums(torch.tensor([[1.0, 2.0, 4.0]]))
        tensor([[0., 1., 3., 7.]])

    Note: on the host: CUDA adds up in another order each time, and refuses to under `deterministic=true`.
    """
    return torch.nn.functional.pad(values.cpu().cumsum(-1), (1, 0)).to(values.device)


def largest_reserved(
    values: torch.Tensor, lambda1: float = 1.5, lambda2: float = 1.0, reserved: str = "all"
) -> torch.Tensor:
    """Return the largest value of each row that is no outlier; what is larger is one.

    Every split of a sorted row whose upper part lies above T is a candidate. The best has the largest
    M = (min(outliers) - max(reserved))^2 - lambda2 * Var(reserved); without a positive M there is no outlier.

    Args:
        values: (R, n), any real values: only the upper tail is searched.
        lambda1: see `coarse_threshold`.
        lambda2: what spread among the reserved values costs; the paper's is 1.
        reserved: `all`, everything below the split, or `coarse`, only what lies above T (the literal reading).

    Returns:
        (R,), values of the rows.

    Example:
        >>> largest_reserved(torch.tensor([[1.0, 2.0, 3.0, 4.0, 90.0, 3.5], [1.0, 2.0, 3.0, 4.0, 5.0, 3.5]]))
        tensor([4., 5.])

    Source: Algorithm 1.
    Note: the printed loop starts at M* = INF and says "minimizing": both are slips; M is maximized. O(n log n) a row:
        the variances of all reserved sets come from running sums.
    """
    ordered = values.double().sort(-1).values
    n = ordered.shape[-1]
    coarse = ordered > coarse_threshold(ordered, lambda1)
    start = RESERVED[reserved](coarse)
    centred = ordered - ordered.mean(-1, keepdim=True)  # so that the running sums of squares lose no digits
    sums, squares = running_sums(centred), running_sums(centred.square())
    # Split i: reserved are start .. i - 1, outliers are i .. n - 1.
    count = (torch.arange(n, device=values.device) - start).clamp_min(1)
    before = start.clamp_max(n)
    mean = (sums[:, :n] - sums.gather(-1, before)) / count
    variance = (squares[:, :n] - squares.gather(-1, before)) / count - mean.square()
    gap = torch.nn.functional.pad(ordered.diff(dim=-1), (1, 0))
    metric = gap.square() - lambda2 * variance.clamp_min(0)
    possible = coarse & (torch.arange(n, device=values.device) > start)
    best, split = metric.masked_fill(~possible, -torch.inf).max(-1, keepdim=True)
    split = torch.where(best > 0, split, n)
    return ordered.gather(-1, split - 1).squeeze(-1).to(values.dtype)
