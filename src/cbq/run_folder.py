"""The folder of a run: what may be started in it, and what it says of itself."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cbq.errors import InputError, check_flag
from cbq.results import RESULTS_NAME, read_results

CONFIG_NAME = "config.yaml"
LOCK_NAME = ".lock"
OUTPUTS = (
    RESULTS_NAME,
    CONFIG_NAME,
    "metrics.csv",
    "blocks.csv",
    "tensorboard",
    "report",
    "report.html",
    "checkpoint",
    "export",
    "wandb",
    "state",
    "trace.json",
    "profile.txt",
)
# What may differ between two runs of one experiment; `runner` repeats the other groups.
NOT_THE_EXPERIMENT = ("overwrite", "tracking", "report", "activations", "runner")


class RunFolder:
    """A run's output folder.

    Args:
        path: made when the run starts.
        config: the composed configuration of the run.
        overwrite: forget what is there.
    """

    def __init__(self, path: Path, config: DictConfig, overwrite: bool = False) -> None:
        check_flag("overwrite", overwrite)
        self.path = path
        self.config = config
        self.overwrite = overwrite

    def is_finished(self) -> bool:
        """Return whether this very run is already finished here. One that is not is to be started anew.

        Raises:
            InputError: the folder holds a run of another configuration, or no run but files with a run's names.
        """
        way_out = "choose another hydra.run.dir, or overwrite=true to start anew"
        try:
            if self.overwrite and (self.path / RESULTS_NAME).is_file():
                return False
            results = read_results(self.path)
            others = [name for name in OUTPUTS if (self.path / name).exists()]
        except OSError as error:
            raise InputError(f"hydra.run.dir {self.path} cannot be used: {error.strerror}") from None
        if results is None and others:  # not ours to remove, whatever `overwrite` says
            raise InputError(f"{self.path} holds no run of cbq, but {', '.join(others)}: choose another hydra.run.dir")
        if results is None:
            return False
        if self._stored_experiment() != experiment(self.config):
            raise InputError(f"{self.path} holds a run with a different configuration: {way_out}")
        return results["status"] == "finished"

    def is_free(self) -> bool:
        """Return whether a failed start may use the folder: no finished run is in it, and no files of others."""
        results = read_results(self.path)
        if results is None:
            return not any((self.path / name).exists() for name in OUTPUTS)
        return results["status"] != "finished"

    def _stored_experiment(self) -> dict | None:
        """Return what decides the result of the run that is here, or None where that cannot be read."""
        try:
            return experiment(OmegaConf.load(self.path / CONFIG_NAME))
        except (OSError, YAMLError, OmegaConfBaseException, AttributeError):
            return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder, which is made. A run that is killed holds it no longer.

        Raises:
            InputError: another run holds it, or it cannot be written to.
        """
        lock = FileLock(self.path / LOCK_NAME)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"hydra.run.dir {self.path} is in use by another run") from None
        except OSError as error:
            raise InputError(f"hydra.run.dir {self.path} cannot be made: {error.strerror}") from None
        try:
            yield
        finally:
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            lock.release()

    def start(self) -> None:
        """Remove what an earlier run left, and write down the configuration; the folder must be `held`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for name in OUTPUTS:
            old = self.path / name
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        OmegaConf.save(self.config, self.path / CONFIG_NAME)


def withdraw(folder: Path) -> None:
    """Leave nothing behind: remove a folder, and those above it, as far as they are empty."""
    for _ in range(3):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def experiment(config: DictConfig) -> dict:
    """Return the part of a configuration that decides the result."""
    plain = OmegaConf.to_container(config, resolve=True)
    if isinstance(plain.get("evaluation"), dict):
        for key in ("baselines", "cache_dir"):  # say nothing about the quantized model
            plain["evaluation"].pop(key, None)
    return {key: value for key, value in plain.items() if key not in NOT_THE_EXPERIMENT}
