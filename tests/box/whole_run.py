"""A whole run on the box: `python -m box.whole_run FOLDER OFFLOAD OVERRIDES...`, in a process of its own."""

import json
import sys
from pathlib import Path

from box import BOX, load_box

DEVICE = load_box()  # before anything asks torch which accelerators there are

# ruff: noqa: E402
import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

import cbq.reconstruction.solver
from cbq.cli import conf_dir, flatten
from cbq.run_folder import RunFolder


class BoxAccelerator(CPUAccelerator):
    """The box, for Lightning."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == BOX.type


def window_trainer(
    device: torch.device, max_steps: int, accumulate_grad_batches: int, callbacks: list[L.Callback]
) -> L.Trainer:
    """Return what `cbq.reconstruction.trainer` does, for a device that Lightning does not know."""
    return L.Trainer(
        strategy=SingleDeviceStrategy(device, BoxAccelerator()),
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate_grad_batches,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main(folder: Path, offload: str, overrides: list[str]) -> None:
    """Run, and add what the device held to `box.json` of the run folder."""
    cbq.reconstruction.solver.window_trainer = window_trainer
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("config", overrides=[f"offload={offload}", *overrides])
    runner = instantiate(config.runner, folder=RunFolder(folder, config), settings=flatten(config))
    runner.device = BOX
    runner.run()
    (folder / "box.json").write_text(json.dumps({"peak_bytes": DEVICE.peak_bytes()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
