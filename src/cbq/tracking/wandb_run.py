"""A Weights & Biases run, the only door to wandb, which is imported only when it is wanted."""

import os
import re
import shutil
from collections.abc import Sequence
from typing import Any

from cbq.errors import InputError, check_text
from cbq.tracking.sink import AXES, STEP, Row, RunInfo, Sink

FORBIDDEN_IN_PROJECT = "/\\#?%:"
MAX_TAG_CHARACTERS = 64  # W&B refuses longer ones
ID_NAME = "run_id.txt"  # beside W&B's own files


class WandbRun(Sink):
    """One W&B run a job.

    A run that goes on after an interruption keeps its id. Offline its file is written anew, with the earlier rows: a
    killed process leaves one that lacks its last 32 KiB of rows, which may be all. Online, W&B resumes the run, and is
    sent what it had not yet got.

    Args:
        mode: "offline" writes the W&B run into the run folder and needs no network, "online" sends it as well and
            needs a login.
        project: W&B project.
        entity: W&B user or team; None is the account's default.
        group: W&B group, for runs that belong together.
    """

    def __init__(self, mode: str, project: str, entity: str | None, group: str | None) -> None:
        check_text("tracking.project", project)
        check_text("tracking.entity", entity, optional=True)
        check_text("tracking.group", group, optional=True)
        self._mode = mode
        self._project = project
        self._entity = entity
        self._group = group
        self._run: Any = None  # a wandb.Run; the type would import wandb
        self._axes: dict[str, str] = {}  # of the columns that are not on the first of `AXES`

    def check(self) -> None:
        if any(character in FORBIDDEN_IN_PROJECT for character in self._project):
            raise InputError(f"tracking.project must not contain any of {FORBIDDEN_IN_PROJECT}, got {self._project!r}")
        if self._mode == "online":
            import wandb

            if not wandb.login(prompt=False):
                raise InputError("tracking.mode=online needs `wandb login`; tracking.mode=offline needs no account")

    def start(self, run: RunInfo) -> None:
        if self._mode == "offline":
            # wandb reports its own crashes over the network, also from an offline run.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            self._run = wandb.init(
                mode=self._mode,
                project=self._project,
                entity=self._entity,
                group=self._group,
                dir=run.folder,
                id=self._earlier_id(run) if run.first_step else None,
                resume="allow" if run.first_step and self._mode == "online" else None,
                name=run.name,
                config=run.config,
                tags=[tag[:MAX_TAG_CHARACTERS] for tag in run.tags],
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
        (run.folder / "wandb" / ID_NAME).write_text(self._run.id + "\n", encoding="utf-8")
        self._axes = {}
        for axis in AXES:
            self._run.define_metric(axis)
        self._run.define_metric("*", step_metric=STEP)
        known = int(self._run.summary.get(STEP, -1)) if self._run.resumed else -1
        for row, axis in run.earlier_rows(after=known):
            self.log([row], axis)

    def log(self, rows: Sequence[Row], axis: str) -> None:
        for name in dict.fromkeys(name for row in rows for name in row if axis != STEP and name not in AXES):
            if self._axes.setdefault(name, STEP) != axis:
                self._axes[name] = axis
                self._run.define_metric(name, step_metric=axis)
        for row in rows:
            self._run.log(dict(row))

    def table(self, name: str, rows: Sequence[Row]) -> None:
        import wandb

        columns = list(dict.fromkeys(column for row in rows for column in row))
        data = [[row.get(column) for column in columns] for row in rows]
        self._run.log({name: wandb.Table(columns=columns, data=data)})

    def finish(self, summary: Row, succeeded: bool) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if succeeded else 1)

    def _earlier_id(self, run: RunInfo) -> str | None:
        """Return the id of the interrupted run; what it left offline is removed, to be written anew.

        Returns:
            None where there is no such run, or where it was sent already: sent twice, rows would be doubled.
        """
        path = run.folder / "wandb" / ID_NAME
        name = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):  # it becomes part of a path below
            return None
        left = list(path.parent.glob(f"offline-run-*-{name}"))
        if any(list(old.glob("*.synced")) for old in left):
            return None
        for old in left:
            shutil.rmtree(old, ignore_errors=True)
        return name
