"""The curves of a run: `metrics.csv` and one Weights & Biases run that hold the same rows.

The only module that imports wandb, and only when it is wanted.
"""

import csv
import math
import os
from pathlib import Path
from typing import Any

from cbq.errors import InputError, check_text

MODES = ("offline", "online", "disabled")
STEP = "cbq_step"
FORBIDDEN_IN_PROJECT = "/\\#?%:"
MAX_TAG_CHARACTERS = 64  # W&B refuses longer ones


class MetricsFile:
    """A CSV file that may gain columns while it grows.

    A row with a new column rewrites the file under the wider header, with empty cells above. This happens a few times
    in a run at most, and the file on disk is a valid table at any time.

    Args:
        path: Where to write; an existing file is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: list[str] = []
        self._file = path.open("w", newline="", encoding="utf-8")

    def append(self, rows: list[dict[str, float]]) -> None:
        """Write rows (column -> value) and flush them to the file; a float keeps every digit of its `repr`."""
        new_columns = list(dict.fromkeys(name for row in rows for name in row if name not in self._columns))
        if new_columns:
            self._widen(new_columns)
        self._writer().writerows(rows)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _writer(self) -> csv.DictWriter:
        return csv.DictWriter(self._file, self._columns, restval="", lineterminator="\n")

    def _widen(self, new_columns: list[str]) -> None:
        self._file.close()
        with self._path.open(newline="", encoding="utf-8") as file:
            old_rows = list(csv.DictReader(file))
        self._columns += new_columns
        wider_path = self._path.with_name(self._path.name + ".tmp")
        self._file = wider_path.open("w", newline="", encoding="utf-8")
        self._writer().writeheader()
        self._writer().writerows(old_rows)
        self._file.flush()
        # The open file follows the rename: later rows land in the file under its new name.
        os.replace(wider_path, self._path)


class Tracker:
    """Records the rows of one run at a time, in `metrics.csv` and in a W&B run of its own.

    Args:
        mode: "offline" writes the W&B run into the run folder and needs no network, "online" sends it as well and
            needs a login, "disabled" never imports wandb.
        project: W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group, for runs that belong together.

    Raises:
        InputError: `mode` is none of the three.
    """

    def __init__(
        self, mode: str = "offline", project: str = "cbq", entity: str | None = None, group: str | None = None
    ) -> None:
        if mode not in MODES:
            raise InputError(f"tracking.mode must be one of {', '.join(MODES)}, not {mode!r}")
        check_text("tracking.project", project)
        check_text("tracking.entity", entity, optional=True)
        check_text("tracking.group", group, optional=True)
        self._mode = mode
        self._project = project
        self._entity = entity
        self._group = group
        self._metrics: MetricsFile | None = None
        self._run: Any = None  # a wandb.Run; the type would import wandb
        self._last_step = -math.inf

    def check(self) -> None:
        """Refuse what W&B will refuse, before anything is written.

        Raises:
            InputError: a project name with characters that W&B does not allow, or online without a login.
        """
        if self._mode == "disabled":
            return
        if any(character in FORBIDDEN_IN_PROJECT for character in self._project):
            raise InputError(f"tracking.project must not contain any of {FORBIDDEN_IN_PROJECT}, got {self._project!r}")
        if self._mode == "online":
            import wandb

            if not wandb.login(prompt=False):
                raise InputError("tracking.mode=online needs `wandb login`; tracking.mode=offline needs no account")

    def start(self, folder: Path, name: str, config: dict, tags: list[str]) -> None:
        """Open `<folder>/metrics.csv` and, unless disabled, a new W&B run below `<folder>/wandb`.

        Args:
            folder: The run folder; made when missing.
            name: The W&B run's name.
            config: The composed configuration, shown with the W&B run.
            tags: The W&B run's tags.

        Raises:
            InputError: W&B refuses the run: not logged in, no connection, or an impossible project name.
        """
        assert self._metrics is None, "the tracker already records a run: finish() or failed() comes first"
        folder.mkdir(parents=True, exist_ok=True)
        if self._mode != "disabled":  # first, so that a refused run leaves no empty table behind
            self._run = self._open_wandb(folder, name, config, tags)
        self._metrics = MetricsFile(folder / "metrics.csv")
        self._last_step = -math.inf

    def log(self, rows: list[dict[str, float]]) -> None:
        """Append rows to the CSV and to W&B.

        Args:
            rows: Column name -> value. Each row has "cbq_step", which grows from row to row over the whole run, all
                windows together; any other column may be left out and may be new.
        """
        assert self._metrics is not None, "start() comes before log()"
        for row in rows:
            assert row[STEP] > self._last_step, f"{STEP} must grow: {row[STEP]} follows {self._last_step}"
            self._last_step = row[STEP]
        # A tensor or a numpy number becomes a plain one; a whole number stays one.
        rows = [{key: value if isinstance(value, int) else float(value) for key, value in row.items()} for row in rows]
        self._metrics.append(rows)
        if self._run is not None:
            for row in rows:
                self._run.log(row)

    def finish(self, summary: dict[str, float]) -> None:
        """Close both, as a success.

        Args:
            summary: The run's results by name, for W&B's table of runs.
        """
        if self._run is not None:
            self._run.summary.update(summary)
        self._close(exit_code=0)

    def failed(self) -> None:
        """Close both, as a failure; nothing happens when no run is open."""
        self._close(exit_code=1)

    def _close(self, exit_code: int) -> None:
        metrics, self._metrics = self._metrics, None
        run, self._run = self._run, None
        if metrics is not None:
            metrics.close()
        if run is not None:
            run.finish(exit_code=exit_code)

    def _open_wandb(self, folder: Path, name: str, config: dict, tags: list[str]) -> Any:
        if self._mode == "offline":
            # wandb reports its own crashes over the network, also from an offline run.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            run = wandb.init(
                mode=self._mode,
                project=self._project,
                entity=self._entity,
                group=self._group,
                dir=folder,
                name=name,
                config=config,
                tags=[tag[:MAX_TAG_CHARACTERS] for tag in tags],
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    save_code=False,
                    disable_code=True,
                    disable_git=True,  # it would store a diff of the user's working tree
                    reinit="create_new",  # jobs of a Hydra sweep share a process: none may touch another's run
                ),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(f"W&B refuses the run: {reason} (tracking.mode=offline needs no account)") from error
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        return run
