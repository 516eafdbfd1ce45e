"""What keeps a window sound when its optimization is not: steps that are not finite are not taken."""

from collections.abc import Sequence

import lightning as L
import torch
from torch import nn

from cbq.reconstruction.module import WindowModule

PATIENCE = 5  # steps in a row that are not finite, before the window starts again
LOWER_RATE = 0.1  # what the learning rates are multiplied by then
READ_EVERY = 16  # steps between two looks at a GPU's numbers: looking waits for the work in flight


class FiniteSteps(L.Callback):
    """Skips a step whose loss or gradient is not finite; after some in a row goes back to the start at a lower rate.

    Attributes:
        skipped: steps of the current window that were not taken.
        restarts: how often the current window went back to its start.

    Note: not in the paper. The optimizer leaves out a step on the device, as it does for a gradient scaler; the host
        looks at every step on a CPU, and every `READ_EVERY` on a GPU, where it may start again that much later.
    """

    def __init__(self) -> None:
        self.skipped = self.restarts = self.in_a_row = 0
        self.start: list[torch.Tensor] = []
        self.unread: list[torch.Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, module: WindowModule) -> None:
        self.skipped = self.restarts = self.in_a_row = 0
        self.start = snapshot(module)
        self.unread = []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: WindowModule, optimizer: torch.optim.Optimizer
    ) -> None:
        module.gradient_norms = {name: gradient_norm(group["params"]) for name, group in module.groups.items()}
        size = torch.stack(list(module.gradient_norms.values())).sum() + module.losses["loss/total"]
        spoiled = size.isfinite().logical_not().float()
        optimizer.found_inf = spoiled
        self.unread.append(spoiled)
        if spoiled.device.type == "cpu" or len(self.unread) == READ_EVERY:
            self._read(module, optimizer)

    def on_train_end(self, trainer: L.Trainer, module: WindowModule) -> None:
        self._read(module, trainer.optimizers[0])

    def _read(self, module: WindowModule, optimizer: torch.optim.Optimizer) -> None:
        """Count what was left out, and start again where it was too much."""
        spoiled = torch.stack(self.unread).tolist() if self.unread else []
        self.unread = []
        for step in spoiled:
            self.skipped += int(step)
            self.in_a_row = self.in_a_row + 1 if step else 0
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


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the 2-norm of the gradients of all of `parameters` together, ()."""
    return torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])


def snapshot(module: WindowModule) -> list[torch.Tensor]:
    """Return a copy of all that the module learns, in host memory."""
    return [parameter.detach().to("cpu", copy=True) for parameter in module.learned]


@torch.no_grad()
def restore_(module: WindowModule, values: list[torch.Tensor]) -> None:
    """Put a `snapshot` back."""
    for parameter, value in zip(module.learned, values, strict=True):
        parameter.copy_(value)
