"""What changes over the steps of a window."""

import math

import lightning as L
import torch

from cbq.errors import InputError
from cbq.reconstruction.module import WindowModule


def check_number(value: float) -> None:
    """Refuse what cannot be compared with a number.

    Raises:
        InputError: it is a text, a truth value or nothing.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"reconstruction: beta_start, beta_end, warmup and hard_start must be numbers, got {value!r}")


class BetaAnnealing(L.Callback):
    """Anneals the beta of Eq. 12 from high, which moves only values near 0 and 1, to low, which moves all.

    Args:
        beta_start: at the end of the warm-up.
        beta_end: when hard rounding starts.
        warmup: share of the steps, from the first on, without compensation loss.
        stop: share of the steps at which beta_end is reached.

    Source: section 3.2, "following Nagel et al."; the paper prints no values: AdaRound's own are 20, 2 and 0.2.
    """

    def __init__(self, beta_start: float = 20.0, beta_end: float = 2.0, warmup: float = 0.2, stop: float = 1.0) -> None:
        for value in (beta_start, beta_end, warmup, stop):
            check_number(value)
        if not beta_start >= beta_end > 0:
            raise InputError(f"reconstruction: beta_start >= beta_end > 0 is needed, got {beta_start} and {beta_end}")
        if not 0 <= warmup < stop <= 1:
            raise InputError(f"reconstruction: 0 <= warmup < hard_start <= 1 is needed, got {warmup} and {stop}")
        self.beta_start, self.beta_end, self.warmup, self.stop = beta_start, beta_end, warmup, stop

    def beta(self, progress: float) -> float | None:
        """Return beta at `progress`, the share of the steps done, or None in the warm-up.

        Example:
            >>> BetaAnnealing(warmup=0.0).beta(0.5)
            11.0
        """
        if progress < self.warmup:
            return None
        position = min(1.0, (progress - self.warmup) / (self.stop - self.warmup))
        return self.beta_end + (self.beta_start - self.beta_end) * 0.5 * (1 + math.cos(math.pi * position))

    def on_train_batch_start(self, trainer: L.Trainer, module: WindowModule, batch: object, batch_index: int) -> None:
        module.beta = self.beta(trainer.global_step / trainer.max_steps)


class HardRounding(L.Callback):
    """Makes every rounding hard in the late steps, so that the step sizes adapt to the integers that will stay.

    Args:
        start: share of the steps after which rounding is hard.

    Source: end of section 3.2, Delta_W = round(Delta_W) "in the later phase"; the paper does not print when.
    """

    def __init__(self, start: float = 0.3333) -> None:
        check_number(start)
        if not 0 < start <= 1:
            raise InputError(f"reconstruction.hard_start must be above 0 and at most 1, got {start}")
        self.start = start

    def on_train_batch_start(self, trainer: L.Trainer, module: WindowModule, batch: object, batch_index: int) -> None:
        if trainer.global_step >= self.start * trainer.max_steps:
            for rounding in module.roundings:
                rounding.harden_()


class BestStep(L.Callback):
    """Ends a window with the values whose batch had the smallest loss, instead of the last ones.

    Only steps with hard rounding count: of the straight-through kinds every one.

    Source: Cheng et al. (2023), Algorithm 1.
    Note: one batch is compared with another: the larger they are, the less noise is picked.
    """

    def __init__(self) -> None:
        self.smallest: torch.Tensor | None = None
        self.best: list[torch.Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, module: WindowModule) -> None:
        self.smallest, self.best = None, []

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: WindowModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not all(rounding.hard for rounding in module.roundings):
            return
        loss = module.losses["loss/rec"]
        if self.smallest is None:
            self.smallest = torch.full_like(loss, math.inf)
            self.best = [parameter.detach().clone() for parameter in module.learned]
        better = loss < self.smallest
        self.smallest = torch.where(better, loss, self.smallest)
        for best, parameter in zip(self.best, module.learned, strict=True):
            best.copy_(torch.where(better, parameter, best))  # no look at the loss: a GPU is not waited for

    @torch.no_grad()
    def on_train_end(self, trainer: L.Trainer, module: WindowModule) -> None:
        if self.best:
            for parameter, best in zip(module.learned, self.best, strict=True):
                parameter.copy_(best)
        self.best = []
