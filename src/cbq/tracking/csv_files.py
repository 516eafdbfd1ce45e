"""`metrics.csv` and `blocks.csv`: every row of a run in plain tables."""

import csv
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cbq.tracking.sink import AXES, BLOCK, STEP, Row, RunInfo, Sink

NAMES = {STEP: "metrics.csv", BLOCK: "blocks.csv"}

LOGGER = logging.getLogger("cbq")


class CsvFile:
    """A CSV file that may gain columns while it grows.

    A row with a new column rewrites the file under the wider header, with empty cells above. This happens a few times
    in a run at most, and the file on disk is a valid table at any time.

    Args:
        path: Where to write; an existing file is replaced.
        rows: What it begins with.
    """

    def __init__(self, path: Path, rows: Sequence[Row] = ()) -> None:
        self._path = path
        self._rewrite(columns_of(rows), rows)

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows (column -> value) and flush them to the file; a float keeps every digit of its `repr`."""
        new_columns = [name for name in columns_of(rows) if name not in self._columns]
        if new_columns:
            self._file.close()
            self._rewrite([*self._columns, *new_columns], read_cells(self._path))
        self._writer().writerows(rows)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _writer(self) -> csv.DictWriter:
        return csv.DictWriter(self._file, self._columns, restval="", lineterminator="\n")

    def _rewrite(self, columns: list[str], rows: Sequence[Row]) -> None:
        self._columns = columns
        new_path = self._path.with_name(self._path.name + ".tmp")
        self._file = new_path.open("w", newline="", encoding="utf-8")
        if columns:
            self._writer().writeheader()
            self._writer().writerows(rows)
        self._file.flush()
        # The open file follows the rename: later rows land in the file under its new name.
        os.replace(new_path, self._path)


class CsvFiles(Sink):
    """A file an axis, made when its first row comes; `metrics.csv` always."""

    def __init__(self) -> None:
        self._files: dict[str, CsvFile] = {}

    def start(self, run: RunInfo) -> None:
        self._folder = run.folder
        self._files = {
            axis: CsvFile(run.folder / NAMES[axis], run.earlier.get(axis, []))
            for axis in AXES
            if axis == STEP or run.earlier.get(axis)
        }

    def log(self, rows: Sequence[Row], axis: str) -> None:
        if axis not in self._files:
            self._files[axis] = CsvFile(self._folder / NAMES[axis])
        self._files[axis].append(rows)

    def finish(self, summary: Row, succeeded: bool) -> None:
        for file in self._files.values():
            file.close()
        self._files = {}


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the columns of rows in the order in which they come up."""
    return list(dict.fromkeys(name for row in rows for name in row))


def read_cells(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as texts, with empty cells."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_rows(path: Path, stop: int | None = None) -> list[Row]:
    """Return the rows of one of a run's files as they were logged, none where there is no file.

    Args:
        path: `metrics.csv` or `blocks.csv`.
        stop: the first step that is left out, with all that follows.

    Note: what a killed process wrote last may be half a line; it is of a step that is left out. What else cannot be
        read ends the rows likewise: curves are no reason not to go on.
    """
    rows: list[Row] = []
    try:
        for cells in read_cells(path) if path.exists() else []:
            if stop is not None and (not (cells[STEP] or "").isdigit() or int(cells[STEP]) >= stop):
                break
            rows.append({name: number(cell) for name, cell in cells.items() if cell})
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        LOGGER.warning("%s cannot be read beyond %d rows: %s", path, len(rows), error)
    return rows


def number(cell: str) -> float:
    """Return what a cell says; a whole number stays one.

    Example:
        >>> number("12"), number("0.5"), number("nan")
        (12, 0.5, nan)
    """
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)
