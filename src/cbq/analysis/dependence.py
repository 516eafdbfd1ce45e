"""How much of a Hessian or of a loss surface is between things rather than in each of them: one number each.

Shapes: n whatever is differentiated by, P points an axis.
"""

import torch


def off_diagonal_mass(hessian: torch.Tensor) -> float:
    """Return the share of the absolute values of a matrix (n, n) that is off its diagonal: 0 to 1.

    0: nothing depends on anything else. A matrix of equal values has 1 - 1/n.

    Example:
        >>> off_diagonal_mass(torch.tensor([[2.0, -1.0], [-1.0, 4.0]]))
        0.25
    """
    absolute = hessian.double().abs()
    return share(absolute.sum() - absolute.diagonal().sum(), absolute.sum())


def mean_by_distance(hessian: torch.Tensor) -> list[float]:
    """Return the mean absolute value of a matrix (n, n) at each distance from its diagonal, 0 to n - 1.

    Example:
        >>> mean_by_distance(torch.tensor([[2.0, -1.0, 0.5], [-1.0, 4.0, 3.0], [0.5, 3.0, 0.0]]))
        [2.0, 2.0, 0.5]
    """
    absolute = hessian.double().abs()
    return [float(absolute.diagonal(distance).mean()) for distance in range(len(hessian))]


def mean_off_diagonal(hessian: torch.Tensor) -> float:
    """Return the mean absolute value off the diagonal of a matrix (n, n).

    Example:
        >>> mean_off_diagonal(torch.tensor([[2.0, -1.0], [-1.0, 4.0]]))
        1.0
    """
    absolute = hessian.double().abs()
    return float((absolute.sum() - absolute.diagonal().sum()) / (absolute.numel() - len(absolute)))


def same_row_mass(hessian: torch.Tensor, num_columns: int) -> float:
    """Return the share of the off-diagonal absolute values that is between weights of one output channel: 0 to 1.

    Args:
        hessian: (n, n), of weights row by row.
        num_columns: weights a row.

    Example:
        >>> same_row_mass(torch.ones(4, 4), num_columns=2)  # each weight: one other in its row, two in the other row
        0.3333333333333333
    """
    absolute = hessian.double().abs()
    absolute = absolute - absolute.diagonal().diag()
    row = torch.arange(len(hessian)) // num_columns
    return share(absolute[row[:, None] == row].sum(), absolute.sum())


def interaction_share(surface: torch.Tensor) -> float:
    """Return the share of a surface's variance that no sum of a function of each coordinate has: 0 to 1.

    That is the interaction of a two-way analysis of variance: 0 for f(a) + g(b), where each coordinate has its best
    value whatever the other is; the counterpart of the off-diagonal mass where steps are not small.

    Args:
        surface: (P, P).

    Example:
        >>> interaction_share(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
        0.0
        >>> interaction_share(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        1.0
    """
    centred = surface.double() - surface.double().mean()
    additive = centred.mean(0, keepdim=True) + centred.mean(1, keepdim=True)
    return share((centred - additive).square().sum(), centred.square().sum())


def share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Return a part of a whole, both (); of nothing there is none.

    Example:
        >>> share(torch.tensor(0.0), torch.tensor(0.0))
        0.0
    """
    return float(part / whole) if whole else 0.0
