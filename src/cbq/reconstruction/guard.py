"""What keeps a window sound when its optimization is not: steps that are not finite are not taken."""

import lightning as L
import torch

from cbq.reconstruction.module import WindowModule

PATIENCE = 5  # steps in a row that are not finite, before the window starts again
LOWER_RATE = 0.1  # what the learning rates are multiplied by then


class FiniteSteps(L.Callback):
    """Skips a step whose loss or gradient is not finite; after some in a row goes back to the start at a lower rate.

    Attributes:
        skipped: steps of the current window that were not taken.
        restarts: how often the current window went back to its start.

    Note: not in the paper. Looking at the numbers waits for the device once a step.
    """

    def __init__(self) -> None:
        self.skipped = self.restarts = self.in_a_row = 0
        self.start: list[torch.Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, module: WindowModule) -> None:
        self.skipped = self.restarts = self.in_a_row = 0
        self.start = snapshot(module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: WindowModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in module.learned if parameter.grad is not None]
        size = torch.nn.utils.get_total_norm(gradients) + module.losses["loss/total"]
        if size.isfinite():
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        optimizer.zero_grad(set_to_none=True)  # Adam passes over a parameter without gradient
        if self.in_a_row == PATIENCE:
            self.in_a_row = 0
            self.restarts += 1
            restore_(module, self.start)
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] *= LOWER_RATE

    def describe(self) -> str | None:
        """Return what was done in the current window, or None."""
        if not self.skipped:
            return None
        restarts = f", {self.restarts} restarts at a lower rate" if self.restarts else ""
        return f"{self.skipped} steps skipped: not finite{restarts}"


def snapshot(module: WindowModule) -> list[torch.Tensor]:
    """Return a copy of all that the module learns, in host memory."""
    return [parameter.detach().to("cpu", copy=True) for parameter in module.learned]


@torch.no_grad()
def restore_(module: WindowModule, values: list[torch.Tensor]) -> None:
    """Put a `snapshot` back."""
    for parameter, value in zip(module.learned, values, strict=True):
        parameter.copy_(value)
