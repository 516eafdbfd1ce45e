"""Rounding by error feedback (GPTQ): what rounding a column loses, the columns still to be rounded make up for.

Shapes: O out_features, I in_features.
"""

import torch

from cbq.errors import InputError, check_flag, check_number
from cbq.quant.given_integers import GivenIntegers
from cbq.quant.linear import QuantLinear
from cbq.reconstruction.linear_by_linear import LinearByLinear
from cbq.reconstruction.losses import ReconstructionLoss


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the upper Cholesky factor of the inverse of `gram` (I, I) with a larger diagonal, (I, I).

    Args:
        gram: positive semidefinite. Where an input is always 0, so is its row and its column.
        damping: is added to the diagonal, times the mean of the diagonal over inputs that are not always 0.

    Raises:
        InputError: so little damping leaves the matrix singular.

    Example:
        >>> inverse_factor(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), damping=0.0).diagonal().tolist()
        [0.5, 0.5]

    Source: step 3 of Frantar et al. (2023), section 3.3.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 0
    size = diagonal[alive].mean() if alive.any() else diagonal.new_ones(())
    # Any positive number would do for an input that is always 0: it shares nothing with the others.
    damped = gram + torch.diag(torch.where(alive, damping * size, size))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise InputError(
            f"reconstruction.damping must be larger, such as 0.01: the inputs of a linear are not independent, and "
            f"{damping!r} does not make up for it"
        )
    return factor


def feed_back_errors(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_range: tuple[int, int],
    factor: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight column by column from the first.

    Args:
        weight: (O, I).
        scale: of each element, (O, I).
        zero_point: of each element, (O, I).
        quant_range: smallest and largest integer.
        factor: what `inverse_factor` gives, its rows in the order of the columns, (I, I).
        block_size: columns whose errors reach the columns after them in one product; no result depends on it.

    Returns:
        the integers less the zero point, (O, I); the weight in units of the scale as each column was rounded, with what
        the columns before it had lost, (O, I).

    Source: Algorithm 1 of Frantar et al. (2023).
    """
    weight, values, steps = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, weight.shape[1], block_size):
        block = slice(start, start + block_size)
        errors = torch.empty_like(weight[:, block])
        for offset, column in enumerate(range(weight.shape[1])[block]):
            rest = slice(column, block.stop)
            shift = zero_point[:, column]
            steps[:, column] = weight[:, column] / scale[:, column]
            integers = (steps[:, column].round() + shift).clamp(*quant_range)
            values[:, column] = integers - shift
            errors[:, offset] = (weight[:, column] - values[:, column] * scale[:, column]) / factor[column, column]
            weight[:, rest] -= torch.outer(errors[:, offset], factor[column, rest])
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return values, steps


class GPTQ(LinearByLinear):
    """Rounds each linear for the smallest change of its outputs, column by column, each column making up for the last.

    Args:
        loss: Eq. 7; only measured.
        damping: what is added to the diagonal of the Gram matrix, as a share of its mean.
        act_order: round the columns with the largest inputs first; otherwise in their order.
        block_size: columns whose errors are passed on in one product: a matter of speed, not of the result.

    Raises:
        InputError: a value is out of range. `solve` raises it where damping is too small for the data.

    Source: Frantar et al. (2023), arXiv 2210.17323, Algorithm 1.
    Note: scales and zero points are those of the weight before any column changed ("static groups"), so that order and
        groups are independent of each other, and preprocessing that sets ranges counts. Columns whose input is always
        0 are rounded to nearest, not set to 0 as in the authors' code: other texts may use them. All in float64.
    """

    def __init__(
        self, loss: ReconstructionLoss, damping: float = 0.01, act_order: bool = True, block_size: int = 128
    ) -> None:
        super().__init__(loss)
        check_number("reconstruction.damping", damping)
        check_flag("reconstruction.act_order", act_order)
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise InputError(f"reconstruction.block_size must be an integer of at least 1, got {block_size!r}")
        self.damping = damping
        self.act_order = act_order
        self.block_size = block_size

    def solve_linear_(self, linear: QuantLinear, gram: torch.Tensor) -> None:
        quantizer = linear.weight_quantizer
        order = torch.arange(linear.in_features, device=gram.device)
        if self.act_order:
            order = gram.diagonal().argsort(descending=True, stable=True)
        group_size = linear.in_features // quantizer.scale.shape[1]
        scale, zero_point = (
            each.double().expand(-1, -1, group_size).flatten(1)[:, order]
            for each in (quantizer.scale, quantizer.zero_point)
        )
        rounded, moved = feed_back_errors(
            linear.weight.double()[:, order],
            scale,
            zero_point,
            (quantizer.quant_min, quantizer.quant_max),
            inverse_factor(gram[order][:, order], self.damping),
            self.block_size,
        )
        values, steps = torch.empty_like(rounded), torch.empty_like(moved)
        values[:, order], steps[:, order] = rounded, moved
        linear.rounding = GivenIntegers(values, steps)
