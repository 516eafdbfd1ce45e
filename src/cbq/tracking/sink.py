"""Where rows go: the interface of every kind."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Row = Mapping[str, float]

STEP = "cbq_step"  # optimizer steps of the whole run, all windows together
BLOCK = "block"
AXES = (STEP, BLOCK)


@dataclass(frozen=True)
class RunInfo:
    """One run, as every sink has to know it.

    Args:
        folder: the run folder; it is there.
        name: of the run.
        config: the settings, flat.
        tags: what runs are found by.
        first_step: the first step that is to come. Above 0 the run goes on where it was interrupted: what is recorded
            of later steps is forgotten where that is possible.
        earlier: by axis, the rows that were recorded before `first_step`.
    """

    folder: Path
    name: str
    config: dict
    tags: Sequence[str]
    first_step: int = 0
    earlier: Mapping[str, Sequence[Row]] = field(default_factory=dict)

    def earlier_rows(self, after: int = -1) -> list[tuple[Row, str]]:
        """Return the earlier rows of later steps than `after`, each with its axis, in the order of their steps."""
        rows = [(row, axis) for axis in AXES for row in self.earlier.get(axis, []) if row[STEP] > after]
        return sorted(rows, key=lambda item: item[0][STEP])


class Sink(ABC):
    """Takes the rows of one run at a time."""

    def check(self) -> None:  # noqa: B027
        """Refuse what will be refused later, before anything is written.

        Raises:
            InputError: an option cannot work.
        """

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Begin a run, or go on with one.

        Raises:
            InputError: the run is refused; nothing is then open.
        """

    @abstractmethod
    def log(self, rows: Sequence[Row], axis: str) -> None:
        """Take rows, whose values are plain numbers, on one axis of `AXES`, which every row has."""

    def table(self, name: str, rows: Sequence[Row]) -> None:  # noqa: B027
        """Take a table of results, shown whole; a sink that has no tables leaves it."""

    @abstractmethod
    def finish(self, summary: Row, succeeded: bool) -> None:
        """End the run."""
