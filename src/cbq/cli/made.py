"""Which folders were there before hydra makes those of its jobs."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

THERE: set[Path] = set()  # of this process's command


class RememberFolders(Callback):
    """Notes what is there before a command makes anything; hydra calls it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folders above the run's, and itself."""
        with suppress(OmegaConfBaseException):  # hydra says what is wrong with it
            remember(Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the folders above the sweep's, itself, and those of earlier jobs in it."""
        with suppress(OmegaConfBaseException):
            remember(Path(config.hydra.sweep.dir))


def remember(folder: Path) -> None:
    """Note which of a folder, those above it and those in it there are."""
    folder = folder.absolute()
    THERE.clear()
    THERE.update(path for path in (folder, *folder.parents) if os.path.exists(path))
    with suppress(OSError, ValueError):  # what cannot be looked into cannot be written to either
        THERE.update(folder.iterdir())
