"""One run's rows, into every sink."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from cbq.errors import InputError, check_flag
from cbq.tracking.csv_files import NAMES, CsvFiles, read_rows
from cbq.tracking.sink import AXES, BLOCK, STEP, Row, RunInfo, Sink
from cbq.tracking.tensorboard import TensorBoard
from cbq.tracking.wandb_run import WandbRun

MODES = ("offline", "online", "disabled")


class Tracker:
    """Records the rows of one run at a time, in CSV files and where else it is wanted.

    Args:
        mode: of W&B: "offline" writes the W&B run into the run folder and needs no network, "online" sends it as well
            and needs a login, "disabled" never imports wandb.
        project: W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group, for runs that belong together.
        tensorboard: write TensorBoard's files too.

    Raises:
        InputError: `mode` is none of the three, or an option is no text.
    """

    def __init__(
        self,
        mode: str = "offline",
        project: str = "cbq",
        entity: str | None = None,
        group: str | None = None,
        tensorboard: bool = False,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"tracking.mode must be one of {', '.join(MODES)}, not {mode!r}")
        check_flag("tracking.tensorboard", tensorboard)
        wandb_run = WandbRun(mode, project, entity, group)
        # W&B first, so that a refused run leaves no empty table behind.
        self._sinks: list[Sink] = [wandb_run] if mode != "disabled" else []
        self._sinks += [TensorBoard()] if tensorboard else []
        self._sinks += [CsvFiles()]
        self._open: list[Sink] = []
        self._last_step = -math.inf

    def check(self) -> None:
        """Refuse what W&B will refuse, before anything is written.

        Raises:
            InputError: a project name with characters that W&B does not allow, online without a login, or a sink whose
                library is not installed.
        """
        for sink in self._sinks:
            sink.check()

    def start(self, folder: Path, name: str, config: dict, tags: list[str], first_step: int = 0) -> None:
        """Open `<folder>/metrics.csv`, and a new W&B run below `<folder>/wandb` unless that is disabled.

        Args:
            folder: The run folder; made when missing.
            name: The W&B run's name.
            config: The settings, shown with the W&B run.
            tags: The W&B run's tags.
            first_step: The first step that is to come. Above 0 the run in the folder goes on: rows of earlier steps
                stay, those of later ones are dropped, and the W&B run is the same.

        Raises:
            InputError: W&B refuses the run: not logged in, no connection, or an impossible project name.
        """
        assert not self._open, "the tracker already records a run: finish() or failed() comes first"
        folder.mkdir(parents=True, exist_ok=True)
        earlier = {axis: read_rows(folder / NAMES[axis], first_step) for axis in AXES} if first_step else {}
        run = RunInfo(folder, name, config, tags, first_step, earlier)
        try:
            for sink in self._sinks:
                sink.start(run)
                self._open.append(sink)
        except BaseException:
            self.failed()
            raise
        self._last_step = first_step - 1 if first_step else -math.inf

    def log(self, rows: Sequence[Row]) -> None:
        """Record rows over the run's steps.

        Args:
            rows: Column name -> value. Each row has "cbq_step", which grows from row to row over the whole run, all
                windows together; any other column may be left out and may be new.
        """
        for row in rows:
            assert row[STEP] > self._last_step, f"{STEP} must grow: {row[STEP]} follows {self._last_step}"
            self._last_step = row[STEP]
        self._log(rows, STEP)

    def log_blocks(self, rows: Sequence[Row]) -> None:
        """Record rows over the model's blocks.

        Args:
            rows: Column name -> value. Each row has "block", and while windows are solved the "cbq_step" by which the
                block was finished; its columns are none of those of `log`.
        """
        self._log(rows, BLOCK)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Record a table of results, column name -> text or number, for those who show tables."""
        for sink in self._open:
            sink.table(name, rows)

    def finish(self, summary: Row) -> None:
        """Close everything, as a success.

        Args:
            summary: The run's results by name, for W&B's table of runs.
        """
        self._close(plain([summary])[0], succeeded=True)

    def failed(self) -> None:
        """Close everything, as a failure; nothing happens when no run is open."""
        self._close({}, succeeded=False)

    def _log(self, rows: Sequence[Row], axis: str) -> None:
        assert self._open, "start() comes before log()"
        rows = plain(rows)
        for sink in self._open:
            sink.log(rows, axis)

    def _close(self, summary: Row, succeeded: bool) -> None:
        sinks, self._open = self._open, []
        for sink in sinks:
            sink.finish(summary, succeeded)


def plain(rows: Iterable[Row]) -> list[Row]:
    """Return rows whose values are Python's numbers: a tensor or a numpy number becomes one; a whole number stays one.

    Example:
        >>> import torch
        >>> plain([{"cbq_step": 1, "loss/rec": torch.tensor(0.5)}])
        [{'cbq_step': 1, 'loss/rec': 0.5}]
    """
    return [{key: value if isinstance(value, int) else float(value) for key, value in row.items()} for row in rows]
