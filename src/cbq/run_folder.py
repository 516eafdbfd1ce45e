"""The folder of a run: what may be started in it, and what it says of itself."""

import hashlib
import json
import shutil
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cbq.durable import replacing, write_text
from cbq.errors import InputError, check_flag
from cbq.results import RESULTS_NAME, failure, read_results, write_results

CONFIG_NAME = "config.yaml"
LOCK_NAME = ".lock"
ERROR_NAME = "error.txt"
LOG_NAME = "run.log"
STATE_NAME = "state"
# What a run that goes on keeps; it is made anew otherwise.
KEPT_BY_RESUME = ("metrics.csv", "blocks.csv", "wandb", "tensorboard", "report", STATE_NAME, LOG_NAME)
OUTPUTS = (
    RESULTS_NAME,
    CONFIG_NAME,
    *KEPT_BY_RESUME,
    "report.html",
    "checkpoint",
    "export",
    "trace.json",
    "profile.txt",
    ERROR_NAME,
)
# What may differ between two runs of one experiment; `runner` repeats the other groups.
NOT_THE_EXPERIMENT = ("overwrite", "save_state", "verbosity", "tracking", "report", "activations", "offload", "runner")
MANY = 3  # differences are not all named


class RunFolder:
    """A run's output folder.

    Args:
        path: made when the run starts.
        config: the composed configuration of the run.
        overwrite: forget what is there.
        overrides: what was typed to make the configuration.
    """

    def __init__(self, path: Path, config: DictConfig, overwrite: bool = False, overrides: Sequence[str] = ()) -> None:
        check_flag("overwrite", overwrite)
        self.path = path
        self.config = config
        self.overwrite = overwrite
        self.overrides = list(overrides)

    @property
    def state_path(self) -> Path:
        """Where the state of the run is."""
        return self.path / STATE_NAME

    @property
    def goes_on(self) -> bool:
        """Whether a run that did not finish is here and not to be forgotten; of a folder that `is_finished` took."""
        return not self.overwrite and (self.path / RESULTS_NAME).is_file()

    def is_finished(self) -> bool:
        """Return whether this very run is already finished here. One that is not goes on.

        Raises:
            InputError: the folder holds a run of another configuration, or no run but files with a run's names.
        """
        way_out = "choose another hydra.run.dir, or overwrite=true to start anew"
        try:
            if self.overwrite and (self.path / RESULTS_NAME).is_file():
                return False
            results = read_results(self.path)
            others = [name for name in OUTPUTS if name != ERROR_NAME and (self.path / name).exists()]
        except OSError as error:
            raise InputError(f"hydra.run.dir {self.path} cannot be used: {error.strerror}") from None
        if results is None and others == [CONFIG_NAME] and not self._differences():  # killed as it began
            return False
        if results is None and others:  # not ours to remove, whatever `overwrite` says
            raise InputError(f"{self.path} holds no run of cbq, but {', '.join(others)}: choose another hydra.run.dir")
        if results is None:
            return False
        differences = self._differences()
        if differences:
            raise InputError(
                f"{self.path} holds a run with a different configuration ({shortened(differences)}): {way_out}"
            )
        return results.get("status") == "finished"

    def is_free(self) -> bool:
        """Return whether a failed start may use the folder: no finished run is in it, and no files of others."""
        results = read_results(self.path)
        if results is None:
            return not any((self.path / name).exists() for name in OUTPUTS)
        return results.get("status") != "finished"

    def _differences(self) -> list[str]:
        """Return what decides the result and is not what it was in the run that is here, in words."""
        try:
            there = experiment(OmegaConf.load(self.path / CONFIG_NAME))
        except (OSError, YAMLError, OmegaConfBaseException, AttributeError, ValueError):
            return [f"its {CONFIG_NAME} cannot be read"]
        before, now = dotted(there), dotted(experiment(self.config))
        return [
            f"{key} was {before.get(key, 'not there')}, is {now.get(key, 'not there')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key, KeyError) != now.get(key, KeyError)
        ]

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
            while not (self.path / LOCK_NAME).exists():  # its last holder removed it in between: another could come too
                lock.release()
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

    def start(self, results: dict) -> None:
        """Remove what an earlier run left, but what this one goes on from, and write down what is known.

        Killed at any moment, it leaves a folder in which this run can be started again. The folder must be `held`.

        Args:
            results: what `results.json` says until the run ends; what was typed is added.
        """
        results |= {"overrides": self.overrides, "working_folder": str(Path.cwd())}
        kept = {RESULTS_NAME, CONFIG_NAME, *(KEPT_BY_RESUME if self.goes_on else ())}
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / RESULTS_NAME).exists():  # first: what is removed below must not count as finished
            write_results(self.path, results)
        for name in OUTPUTS:
            if name not in kept:
                remove(self.path / name)
        # Only now: until here it is the folder of the run that was there, whose state may still be.
        with replacing(self.path / CONFIG_NAME) as temporary:
            OmegaConf.save(self.config, temporary)
        write_results(self.path, results)

    def remove_state(self) -> None:
        """Remove what a run that is finished went on from; the folder must be `held`."""
        remove(self.state_path)

    def fingerprint(self) -> str:
        """Return the hash of what decides the result."""
        text = json.dumps(dotted(experiment(self.config)), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def report_failure(self, error: BaseException, last_state: str, environment: dict) -> None:
        """Write down what ended the run, where it was, and with which configuration.

        Args:
            error: what was raised.
            last_state: how far the run was, and how it goes on, in words.
            environment: of versions and hardware.
        """
        parts = {
            "error": failure(error),
            "last state": last_state,
            "environment": "\n".join(f"{key}: {value}" for key, value in environment.items()),
            "traceback": "".join(traceback.format_exception(error)).rstrip(),
            "configuration": OmegaConf.to_yaml(self.config).rstrip(),
        }
        text = "\n\n".join(f"[{title}]\n{content}" for title, content in parts.items())
        write_text(self.path / ERROR_NAME, text + "\n")


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def withdraw(folder: Path, kept: Collection[Path]) -> None:
    """Leave nothing behind: remove a folder, and those above it, as far as they are empty.

    Args:
        folder: of a run that did not begin.
        kept: what was there before; absolute paths.
    """
    folder = folder.absolute()
    while folder not in kept:
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


def dotted(nested: dict, prefix: str = "") -> dict:
    """Return every value by its dotted key.

    Example:
        >>> dotted({"quant": {"bits": 4}, "seed": 0})
        {'quant.bits': 4, 'seed': 0}
    """
    flat = {}
    for key, value in nested.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def shortened(differences: list[str]) -> str:
    """Return the first differences, and how many there are more."""
    more = len(differences) - MANY
    return "; ".join(differences[:MANY]) + (f"; and {more} more" if more > 0 else "")
