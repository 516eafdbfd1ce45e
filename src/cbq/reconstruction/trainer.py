"""The Trainer of one window."""

import logging

import lightning as L
import torch

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)  # one "GPU available" banner a window


def window_trainer(
    device: torch.device, max_steps: int, accumulate_grad_batches: int, callbacks: list[L.Callback]
) -> L.Trainer:
    """Return a Trainer that fits and does nothing else.

    Args:
        device: to work on.
        max_steps: optimizer steps.
        accumulate_grad_batches: batches an optimizer step.
        callbacks: in the order in which they are called.
    """
    return L.Trainer(
        accelerator=device.type if device.type != "cuda" else "gpu",
        devices=1 if device.type != "cuda" else [device.index or 0],
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate_grad_batches,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
