"""What is recorded of every step of a window.

Values stay on the device until the window ends: a step never waits for the GPU to be read.
"""

import time
from collections.abc import Callable, Sequence

import lightning as L
import torch

from cbq.devices import memory_now_gib
from cbq.quant.linear import quant_linears
from cbq.quant.quantizer import act_quantizers
from cbq.reconstruction.module import WindowModule

Rows = list[dict[str, float]]

LOOK_EVERY = 32  # steps between two looks at all of a window's weights, which cost about as much as its forward


class WindowCurves(L.Callback):
    """Records every step on one axis over the whole run: losses, beta, learning rates, gradient norms, memory, time.

    Every `LOOK_EVERY` steps and in a window's last one also how far its rounding and step sizes have come.

    Args:
        record: takes a window's rows: each a dict of metric name to number.

    Attributes:
        step: the next one's number.
        window: the present one's.
    """

    def __init__(self, record: Callable[[Rows], None]) -> None:
        self.record = record
        self.step = 0
        self.window = -1
        self.rows: Rows = []
        self.values: list[dict[str, torch.Tensor]] = []  # of each row, on the device

    def on_fit_start(self, trainer: L.Trainer, module: WindowModule) -> None:
        self.window += 1
        self.rows, self.values = [], []
        self.began = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: WindowModule, optimizer: torch.optim.Optimizer
    ) -> None:
        rates = zip(module.groups, optimizer.param_groups, strict=True)
        row = {"cbq_step": self.step, "window": self.window} | {f"lr/{name}": group["lr"] for name, group in rates}
        self.rows.append(row if module.beta is None else row | {"beta": module.beta})
        self.values.append({f"gradient_norm/{name}": norm for name, norm in module.gradient_norms.items()})
        self.step += 1

    def on_train_batch_end(
        self, trainer: L.Trainer, module: WindowModule, outputs: object, batch: object, batch_index: int
    ) -> None:
        if not self.rows or "time/step_seconds" in self.rows[-1]:
            return  # gradients are still accumulated
        self.values[-1] |= module.losses
        if len(self.rows) % LOOK_EVERY == 0 or len(self.rows) == trainer.max_steps:
            self.values[-1] |= progress_of(module)
        now = time.perf_counter()
        self.rows[-1] |= memory_now_gib(outputs["loss"].device) | {"time/step_seconds": now - self.began}
        self.began = now

    def on_fit_end(self, trainer: L.Trainer, module: WindowModule) -> None:
        for row, values in zip(self.rows, read(self.values), strict=True):
            row.update(values)
        self.record(self.rows)
        self.rows, self.values = [], []


@torch.no_grad()
def progress_of(module: WindowModule) -> dict[str, torch.Tensor]:
    """Return how far a window's rounding and step sizes have come from where they started, () each, on the device.

    Returns:
        `rounding/hard`: the share of rounding values that are integers. `rounding/changed`: the share of integers away
        from round-to-nearest's at the initial scale. `drift/weight_scale`: the mean of |s / s_0 - 1| over the scales;
        `drift/act_scale`: that of |m - 1| over the multipliers of activations. What is not quantized is left out.
    """
    linears = [linear for linear in quant_linears(list(module.blocks)) if linear.weight_quantizer is not None]
    found: dict[str, torch.Tensor] = {}
    if linears:
        counts = torch.stack([linear.rounding_counts() for linear in linears]).sum(0)
        shares = counts / sum(linear.weight.numel() for linear in linears)
        quantizers = [linear.weight_quantizer for linear in linears]
        drifts = torch.cat([(each.scale / each.initial_scale - 1).abs().flatten() for each in quantizers])
        found |= {"rounding/hard": shares[0], "rounding/changed": shares[1], "drift/weight_scale": drifts.mean()}
    multipliers = [each.range_multiplier for each in act_quantizers(list(module.blocks)) if each.has_multiplier]
    if multipliers:
        found["drift/act_scale"] = (torch.stack(multipliers) - 1).abs().mean()
    return found


def read(rows: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Return rows of tensors () as numbers, read from the device all at once."""
    values = [value for row in rows for value in row.values()]
    if not values:
        return [{} for _ in rows]
    device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
    numbers = iter(torch.stack([value.detach().float().to(device) for value in values]).tolist())
    return [{name: next(numbers) for name in row} for row in rows]
