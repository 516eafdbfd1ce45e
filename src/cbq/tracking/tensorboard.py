"""TensorBoard's files, by torch's writer; imported only when they are wanted."""

import shutil
import warnings
from collections.abc import Sequence
from typing import Any

from cbq.errors import InputError
from cbq.tracking.sink import AXES, Row, RunInfo, Sink

FOLDER_NAME = "tensorboard"


class TensorBoard(Sink):
    """`<run folder>/tensorboard`: every column a scalar over its axis, the settings as a text, the summary at the end.

    Of a run that goes on after an interruption they are written anew.
    """

    def check(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise InputError("tracking.tensorboard=true needs an extra: pip install 'cbq[tensorboard]'") from error

    def start(self, run: RunInfo) -> None:
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        self._step = 0
        # Not its own way to go on, `purge_step`: it would forget blocks by the numbers of steps.
        shutil.rmtree(run.folder / FOLDER_NAME, ignore_errors=True)
        self._writer: Any = SummaryWriter(run.folder / FOLDER_NAME)
        lines = [f"**{run.name}** ({', '.join(run.tags)})\n", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in run.config.items()]
        self._writer.add_text("settings", "\n".join(lines))
        for row, axis in run.earlier_rows():
            self.log([row], axis)

    def log(self, rows: Sequence[Row], axis: str) -> None:
        for row in rows:
            position = int(row[axis])
            for name, value in row.items():
                if name not in AXES:
                    self._writer.add_scalar(name, value, position)
            if axis == AXES[0]:
                self._step = position
        self._writer.flush()

    def finish(self, summary: Row, succeeded: bool) -> None:
        for name, value in summary.items():
            self._writer.add_scalar(f"summary/{name}", value, self._step)
        self._writer.close()
