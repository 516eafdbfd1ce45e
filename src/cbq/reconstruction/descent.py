"""How what a window learns is moved: an optimizer and the course of its rates."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from cbq.errors import InputError, one_line


def adam(params: list[dict]) -> torch.optim.Adam:
    """Return Adam as one kernel over all parameters."""
    return torch.optim.Adam(params, fused=True)


class SignSGD(Optimizer):
    """Moves every value by the learning rate against the sign of its gradient.

    Args:
        params: as of any optimizer.
        lr: size of a step.

    Source: Cheng et al. (2023), Eq. 5.
    """

    def __init__(self, params: list, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Take a step, unless `found_inf` says that a gradient is not finite, as torch's fused optimizers do."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = parameter.grad.sign()
                if found_inf is not None:
                    direction = torch.where(found_inf.to(direction.device) > 0, torch.zeros_like(direction), direction)
                parameter.sub_(direction, alpha=group["lr"])
        return loss


@dataclass(frozen=True)
class Descent:
    """An optimizer and its schedule.

    Args:
        optimizer: makes it from parameter groups that bring their rates. It must leave out a step whose `found_inf`
            is 1.
        schedule: makes the schedule from the optimizer and the number of steps.

    Raises:
        InputError: they take an option for something else, or cannot be made.

    Source: section 5.1 (CosineAnnealingLR); the paper does not name the optimizer.
    """

    optimizer: Callable[[list[dict]], Optimizer] = adam
    schedule: Callable[[Optimizer, int], LRScheduler] = CosineAnnealingLR

    def __post_init__(self) -> None:
        parameter = torch.zeros(1, requires_grad=True)
        parameter.grad = torch.zeros(1)
        try:  # a wrong option speaks up before any work
            optimizer = self.optimizer([{"params": [parameter], "lr": 1e-3}])
            schedule = self.schedule(optimizer, 2)
            optimizer.step()
            schedule.step()
        except Exception as error:  # whatever torch makes of it
            raise InputError(f"reconstruction.descent cannot be made: {one_line(error)}") from None
        if not math.isfinite(optimizer.param_groups[0]["lr"]) or not parameter.isfinite().all():
            raise InputError("reconstruction.descent must move what is learned by a finite rate")
