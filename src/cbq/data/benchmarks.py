"""The items of zero-shot benchmarks, as their authors publish them: read, checked, and in the harness's columns."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets

from cbq.data.files import as_dataset, find_local, read_rows, read_text
from cbq.errors import InputError, expanded
from cbq.hub import fetch_file

Row = dict[str, object]
Rows = TypeVar("Rows", list[Row], datasets.Dataset)
SPLITS = ("train", "validation", "test")
PARQUET_REVISION = "refs/convert/parquet"  # where the hub keeps its own conversion of datasets that were scripts


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of the table below.

    Args:
        split: how the harness calls its items.
        files: the authors' files below `data_dir`.
        read: makes rows with the harness's columns of those files.
        columns: what every row must have.
        num_items: as published; another number is worth a word.
        parquet: the same on the hub as (repository, file) of its parquet conversion, where the harness's own way to
            load it is a script, which datasets no longer runs.
        may_be_empty: the columns whose text may be.
    """

    split: str
    files: tuple[str, ...]
    read: Callable[..., list[Row]]
    columns: tuple[str, ...]
    num_items: int
    parquet: tuple[str, str] | None = None
    may_be_empty: tuple[str, ...] = ()


def read_json_lines(path: Path) -> list[Row]:
    """Return the objects of a file that has one a line.

    Raises:
        InputError: a line is no JSON object.
    """
    rows = []
    # Not splitlines: it also cuts at what Unicode calls a line separator, which may stand in a text.
    text = read_text(path).removesuffix("\n")
    for number, line in enumerate(text.split("\n") if text else [], 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number} is not a JSON object: the file is damaged or cut off")
        rows.append(row)
    return rows


def read_csv(path: Path, columns: Sequence[str] | None = None) -> list[Row]:
    """Return the rows of a CSV file, `label` as an integer.

    Args:
        path: the file.
        columns: its columns, if its first line does not name them.

    Raises:
        InputError: a row has too few or too many fields, or its label is neither 0 nor 1.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[Row] = []
    try:
        for fields in reader:
            if columns is None:
                columns = fields
                continue
            row: Row = dict(zip(columns, fields, strict=True))
            if "label" in row:
                row["label"] = {"0": 0, "1": 1}[row["label"]]
            rows.append(row)
    except (csv.Error, ValueError, KeyError):
        raise InputError(f"{path} line {reader.line_num} is not as its header says: damaged or cut off") from None
    return rows


def read_piqa(items: Path, labels: Path) -> list[Row]:
    """Return the questions of PIQA with their labels, line by line."""
    rows, lines = read_json_lines(items), read_text(labels).split()
    if len(rows) != len(lines) or not set(lines) <= {"0", "1"}:
        raise InputError(f"{labels} must hold a 0 or a 1 for each of the {len(rows)} lines of {items.name}")
    return [row | {"label": int(label)} for row, label in zip(rows, lines, strict=True)]


def read_arc(path: Path) -> list[Row]:
    """Return the questions of ARC, whose stem and choices lie one level deeper in the authors' file."""
    try:
        rows = []
        for row in read_json_lines(path):
            stem, choices = row["question"]["stem"], row["question"]["choices"]
            columns = {part: [choice[part] for choice in choices] for part in ("text", "label")}
            rows.append({"question": stem, "choices": columns, "answerKey": row["answerKey"]})
        return rows
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} does not have the fields of ARC: {error}") from None


def read_virtue(path: Path) -> list[Row]:
    """Return the items of ETHICS' virtue, whose trait stands behind the scenario."""
    rows = read_csv(path)
    for row in rows:
        row["scenario"], separator, row["trait"] = str(row.get("scenario")).partition(" [SEP] ")
        if not separator:
            raise InputError(f"{path} has a scenario without ' [SEP] ' and a trait: {row['scenario'][:60]!r}")
    return rows


def read_utilitarianism(path: Path) -> list[Row]:
    """Return the pairs of ETHICS' utilitarianism, of which the first is the more pleasant."""
    return read_csv(path, ("activity", "baseline"))


ETHICS = "EleutherAI/hendrycks_ethics"
CHOICES = ("question", "choices", "answerKey")
BENCHMARKS = {
    "piqa": Benchmark(
        "validation", ("piqa/valid.jsonl", "piqa/valid-labels.lst"), read_piqa, ("goal", "sol1", "sol2", "label"), 1838
    ),
    "hellaswag": Benchmark(
        "validation",
        ("hellaswag/hellaswag_val.jsonl",),
        read_json_lines,
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        10042,
        may_be_empty=("ctx_b",),
    ),
    "arc_easy": Benchmark("test", ("ARC-Easy/ARC-Easy-Test.jsonl",), read_arc, CHOICES, 2376),
    "arc_challenge": Benchmark("test", ("ARC-Challenge/ARC-Challenge-Test.jsonl",), read_arc, CHOICES, 1172),
    "mutual": Benchmark(
        "validation",
        ("mutual/mutual_dev.jsonl",),
        read_json_lines,
        ("article", "options", "answers"),
        886,
        ("EleutherAI/mutual", "mutual/validation/0000.parquet"),
    ),
    "ethics_cm": Benchmark(
        "test",
        ("ethics/commonsense/cm_test.csv",),
        read_csv,
        ("input", "label"),
        3885,
        (ETHICS, "commonsense/test/0000.parquet"),
    ),
    "ethics_deontology": Benchmark(
        "test",
        ("ethics/deontology/deontology_test.csv",),
        read_csv,
        ("scenario", "excuse", "label"),
        3596,
        (ETHICS, "deontology/test/0000.parquet"),
    ),
    "ethics_justice": Benchmark(
        "test",
        ("ethics/justice/justice_test.csv",),
        read_csv,
        ("scenario", "label"),
        2704,
        (ETHICS, "justice/test/0000.parquet"),
    ),
    "ethics_utilitarianism": Benchmark(
        "test",
        ("ethics/utilitarianism/util_test.csv",),
        read_utilitarianism,
        ("activity", "baseline"),
        4808,
        (ETHICS, "utilitarianism/test/0000.parquet"),
    ),
    "ethics_virtue": Benchmark(
        "test",
        ("ethics/virtue/virtue_test.csv",),
        read_virtue,
        ("scenario", "trait", "label"),
        4975,
        (ETHICS, "virtue/test/0000.parquet"),
    ),
}


def load_benchmark(name: str, data_dir: str | None) -> dict[str, datasets.Dataset] | None:
    """Return the items of a benchmark by split, or None where the harness has its own way to the hub.

    Args:
        name: as the harness calls it; any, but only those of `BENCHMARKS` are read in their authors' form.
        data_dir: the local folder: the files of `BENCHMARKS`, or `<name>/<split>.parquet` or `.jsonl` with the
            harness's columns. None: the hub.

    Raises:
        InputError: a local file is missing or damaged, or the hub cannot be reached.
    """
    known = BENCHMARKS.get(name)
    if data_dir is None:
        if known is None or known.parquet is None:
            return None
        repository, file = known.parquet
        path = fetch_file(repository, file, revision=PARQUET_REVISION)
        return {known.split: checked(read_rows("parquet", path, known.columns), known, path)}
    if known and (files := [find_local(data_dir, file) for file in known.files]) and all(files):
        rows = checked(known.read(*files), known, files[0])
        return {known.split: as_dataset([{column: row[column] for column in known.columns} for row in rows])}
    found = {split: rows for split in SPLITS if (rows := read_split(data_dir, name, split, known)) is not None}
    if not found:
        authors = f"{' and '.join(known.files)}, or " if known else ""
        raise InputError(f"data_dir {data_dir!r} has no {name}: it needs {authors}{name}/<split>.parquet or .jsonl")
    return found


def read_split(data_dir: str, name: str, split: str, known: Benchmark | None) -> datasets.Dataset | None:
    """Return one split in the harness's own columns, or None if it is not there."""
    for kind, suffix in (("parquet", "parquet"), ("json", "jsonl")):
        path = expanded(data_dir) / name / f"{split}.{suffix}"
        if path.is_file():
            rows = read_rows(kind, path, known.columns if known else None)
            return checked(rows, known, path) if known else rows
    return None


def checked(rows: Rows, benchmark: Benchmark, path: Path) -> Rows:
    """Return items as they are, unless one lacks something or has an answer that is not among its choices.

    Raises:
        InputError: there is one, or there are none at all.
    """
    if not len(rows):
        raise InputError(f"{path} holds no items")
    for number, row in enumerate(rows, 1):
        empty = [column for column in benchmark.columns if row.get(column) in (None, "", [])]
        missing = [column for column in empty if row.get(column) is None or column not in benchmark.may_be_empty]
        if missing:
            raise InputError(f"{path}: item {number} has no {missing[0]!r}")
        if not answers_fit(row):
            raise InputError(f"{path}: item {number} has an answer that is none of its choices")
    return rows


def answers_fit(row: Row) -> bool:
    """Return whether the answer of an item, if it names one by a letter or a number, is one of its choices.

    Example:
        >>> answers_fit({"options": ["yes", "no"], "answers": "B"})
        True
        >>> answers_fit({"endings": ["a", "b", "c", "d"], "label": 4})
        False
    """
    if isinstance(options := row.get("options"), list):
        return row["answers"] in letters(options)
    if isinstance(endings := row.get("endings"), list):
        return str(row["label"]) in [str(index) for index in range(len(endings))]
    if isinstance(choices := row.get("choices"), dict):
        return row["answerKey"] in choices["label"]
    return True


def letters(options: Iterable[object]) -> list[str]:
    """Return the letters of some options: A, B, ..."""
    return [chr(ord("A") + index) for index, _ in enumerate(options)]
