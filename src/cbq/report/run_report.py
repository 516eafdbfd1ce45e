"""The page of one run: what it watches while the run works, and `report.html` at the end.

A failure here is said in a line and ends nothing: the run is what took hours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from cbq.report.observer import OutlierWatch, watch_weights, write_texts
from cbq.report.run_page import write_run_page


class NoReport:
    """Watches nothing and writes nothing."""

    def begin(self, folder: Path, console: Console) -> None:
        """Hear where the run is, and where to say what went wrong."""

    @contextmanager
    def preprocessing(
        self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, preprocess: object
    ) -> Iterator[None]:
        """Surround preprocessing."""
        yield

    def finish_blocks(self, blocks: nn.ModuleList, indices: Sequence[int]) -> None:
        """Hear of finished blocks, still in the learned state."""

    def finish(self, texts: dict[str, str]) -> None:
        """Write the page of a run whose results are written."""

    def fail(self) -> None:
        """Write the page of a run that failed, as far as it came; its results are written."""


class RunReport(NoReport):
    """Watches outliers and weights, and writes `report.html` and the figures beside it."""

    def __init__(self) -> None:
        self.folder: Path | None = None

    def begin(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console

    @contextmanager
    def preprocessing(
        self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, preprocess: object
    ) -> Iterator[None]:
        watch = None
        with self._harmless("outliers are not shown"):
            watch = OutlierWatch(model, blocks, segments, preprocess)
        yield
        if watch is not None:
            with self._harmless("outliers are not shown"):
                watch.write(self.folder)

    def finish_blocks(self, blocks: nn.ModuleList, indices: Sequence[int]) -> None:
        with self._harmless("weights are not shown"):
            watch_weights(self.folder, blocks, indices)

    def finish(self, texts: dict[str, str]) -> None:
        with self._harmless("no report"):
            write_texts(self.folder, texts)
            write_run_page(self.folder)

    def fail(self) -> None:
        if self.folder is not None:
            with self._harmless("no report"):
                write_run_page(self.folder)

    @contextmanager
    def _harmless(self, consequence: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.console.print(f"{consequence}: {reason}", markup=False, soft_wrap=True)
