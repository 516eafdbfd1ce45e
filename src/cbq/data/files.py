"""Files of texts and of benchmarks: where they are, and what is in them. The only door to datasets."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from cbq.errors import InputError, check_text, expanded
from cbq.hub import fetch_file


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep datasets from showing progress, and from logging the errors that it also raises."""
    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def read_text(path: Path) -> str:
    """Read a text file in UTF-8.

    Raises:
        InputError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"text file {path} cannot be read: {error.strerror}") from error


def find_local(data_dir: str, filename: str) -> Path | None:
    """Return where a file is in a local folder, with or without the folders of its name; None if nowhere."""
    folder = expanded(data_dir)
    return next((path for path in (folder / filename, folder / Path(filename).name) if path.is_file()), None)


def find_file(repo_id: str, filename: str, data_dir: str | None) -> Path:
    """Return the local path of a dataset's file: in the local folder if one is given, else in the hub cache.

    Raises:
        InputError: it is not there, nor to be had.
    """
    check_text("data_dir", data_dir, optional=True)
    if data_dir is None:
        return fetch_file(repo_id, filename)
    path = find_local(data_dir, filename)
    if path is None:
        raise InputError(f"data_dir {data_dir!r} holds neither {filename} nor {Path(filename).name} (of {repo_id})")
    return path


def read_rows(kind: Literal["parquet", "json"], path: Path, columns: Sequence[str] | None) -> datasets.Dataset:
    """Return the rows of a file; datasets keeps it on disk, memory-mapped, and reads what is indexed.

    Args:
        kind: of the file; JSON has an object a line.
        path: the file.
        columns: those that are needed; all if None.

    Raises:
        InputError: it is not such a file, is corrupt, or lacks a column.
    """
    # Not load_dataset: even for a local file it reports its use to a server, with retries when there is no network.
    read = datasets.Dataset.from_parquet if kind == "parquet" else datasets.Dataset.from_json
    try:
        with quiet_datasets():
            rows = read(str(path))
            return rows if columns is None else rows.select_columns(list(columns))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, EOFError, StopIteration) as error:
        names = ", ".join(f"`{column}`" for column in columns or [])
        wanted = f" with a column {names}" if columns else ""
        raise InputError(f"{path} is not a {kind} file{wanted}, or is corrupt") from error


def as_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Return rows in memory as a dataset."""
    return datasets.Dataset.from_list(rows)
