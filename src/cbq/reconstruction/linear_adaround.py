"""Rounding learned linear by linear (AdaRound), the loss computed from the Gram matrix of the inputs.

Shapes: O out_features, I in_features.
"""

from collections.abc import Callable

import torch

from cbq.errors import InputError, check_number
from cbq.quant.kernels import choose_kernels, run_by
from cbq.quant.linear import QuantLinear
from cbq.quant.quantizer import WeightQuantizer
from cbq.quant.rounding import Nearest, Rounding
from cbq.reconstruction.callbacks import BetaAnnealing, HardRounding
from cbq.reconstruction.linear_by_linear import LinearByLinear
from cbq.reconstruction.losses import ReconstructionLoss

NOTHING_TO_GAIN = 1e-12  # of an output's square: what float32 makes of weights that are on the grid


def output_error(change: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return what a change of a weight does to each output, squared, summed over inputs: the diagonal of C H C^T, (O,).

    Args:
        change: C, (O, I), differentiable.
        gram: H, the sum of x x^T over the inputs x, (I, I).

    Example:
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> output_error(torch.tensor([[3.0, 1.0]]), x @ x.T)  # (3 * 1 + 1 * 2)^2
        tensor([25.])
    """
    product = change.detach() @ gram
    # The gradient is 2 C H: the product at hand, so that the backward needs none of its own.
    return (product * (2 * change - change.detach())).sum(-1)


class LinearAdaRound(LinearByLinear):
    """Learns each linear's rounding for the smallest change of its outputs, ||W_q x - W x||^2 over all inputs at once.

    Args:
        loss: Eq. 7; only measured.
        rounding: makes a linear's rounding from its out_features and in_features; AdaRound's own is `AdaRound`.
        num_steps: optimizer steps a linear, each on all calibration tokens.
        compensation_weight: of the rounding's regularizer, as the gamma of Eq. 13.
        beta_start: see `BetaAnnealing`.
        beta_end: see `BetaAnnealing`.
        warmup: see `BetaAnnealing`.
        hard_start: share of the steps after which rounding is hard; beta reaches beta_end there. At 1 it is soft until
            the last step, as in AdaRound.

    Raises:
        InputError: a value is out of range.

    Source: Nagel et al. (2020), arXiv 2004.10568, Eq. 21 to 25.
    Note: the loss is a share of round-to-nearest's, each output's of its own and averaged, so that one compensation
        weight serves all outputs, linears and bits: a weight moved by one step s adds s^2 H_jj, round-to-nearest of the
        I weights of its output about I s^2 mean(H_jj) / 12. Between its two integers a weight then meets a curvature of
        24 / (O I) H_jj / mean(H_jj) of the loss, and at beta 2 one of -8 / (O I) times the compensation weight: 400
        drives it to an end for inputs of up to 133 times the mean square. Under larger ones weights may be left
        between, to be rounded blindly: an output that ends worse than by round-to-nearest is rounded to nearest.
        The target is W x on the quantized stream's x, not on full precision's, and there is no activation function
        after it (the paper's Eq. 25 has both): so the loss is a function of the Gram matrix, exact at every step, and
        no inputs are kept.
    """

    def __init__(
        self,
        loss: ReconstructionLoss,
        rounding: Callable[[int, int], Rounding],
        num_steps: int = 1000,
        compensation_weight: float = 400.0,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
        warmup: float = 0.2,
        hard_start: float = 1.0,
    ) -> None:
        super().__init__(loss)
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise InputError(f"reconstruction.num_steps must be an integer of at least 1, got {num_steps!r}")
        check_number("reconstruction.compensation_weight", compensation_weight)
        check_number("rounding.learning_rate", rounding(1, 1).learning_rate)
        if not list(rounding(1, 1).parameters()):
            raise InputError("reconstruction=linear_adaround needs a rounding that learns, such as rounding=adaround")
        self.rounding = rounding
        self.num_steps = num_steps
        self.compensation_weight = compensation_weight
        self.hard_start = HardRounding(hard_start).start
        self.annealing = BetaAnnealing(beta_start, beta_end, warmup, hard_start)

    def solve_linear_(self, linear: QuantLinear, gram: torch.Tensor) -> None:
        quantizer, weight = linear.weight_quantizer, linear.weight.float()
        rounding = self.rounding(linear.out_features, linear.in_features).to(weight.device)
        nearest = quantizer(weight, Nearest(linear.out_features, linear.in_features))
        errors = output_error((nearest - weight).double(), gram)
        largest = gram.diagonal().amax()
        # Not finite, or nearly exact: with nothing to gain an output stays as it is.
        exact = errors <= NOTHING_TO_GAIN * output_error(weight.double(), gram)
        shares = (largest / errors).float().masked_fill(exact, 0).nan_to_num(0, 0, 0)
        if shares.any() and rounding.learning_rate and list(rounding.parameters()):
            kernels = choose_kernels("auto", weight.device, weight.numel(), self.num_steps)
            with torch.enable_grad(), run_by([quantizer], kernels):
                self._learn_(rounding, quantizer, weight, (gram / largest).float(), shares)
            rounding.harden_()
            learned = output_error((quantizer(weight, rounding) - weight).double(), gram)
            worse = ~(learned <= errors)  # also if it is no number
            rounding.reset_(worse)
            self.notes += ["an output kept round-to-nearest: its learned rounding was worse"] * int(worse.sum())
        rounding.harden_()
        linear.rounding = rounding.requires_grad_(False)

    def roundings(self, linear: QuantLinear) -> list[Rounding]:
        return [self.rounding(linear.out_features, linear.in_features)]

    def _learn_(
        self,
        rounding: Rounding,
        quantizer: WeightQuantizer,
        weight: torch.Tensor,
        gram: torch.Tensor,
        shares: torch.Tensor,
    ) -> None:
        """Take all steps of one linear.

        Args:
            rounding: starts at round-to-nearest.
            quantizer: the linear's.
            weight: (O, I), float32.
            gram: in any unit, (I, I), float32.
            shares: makes an output's error a share of round-to-nearest's, (O,), float32; 0 where it is not to change.
        """
        optimizer = torch.optim.Adam(rounding.parameters(), lr=rounding.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        for step in range(self.num_steps):
            progress = step / self.num_steps
            if progress >= self.hard_start:
                rounding.harden_()
            rounding.beta = self.annealing.beta(progress)
            loss = (output_error(quantizer(weight, rounding) - weight, gram) * shares).mean()
            penalty = rounding.penalty()
            if penalty is not None:
                loss = loss + self.compensation_weight * penalty
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
