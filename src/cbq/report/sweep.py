"""A table of a sweep's runs: a row a cell, its seeds averaged, columns by model and corpus."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from cbq.errors import InputError
from cbq.report.columns import COSTS, MEMORY, SECONDS, cost_of, figure_of, is_task, measured
from cbq.report.paper import FULL_PRECISION, comparable, figure, place
from cbq.report.run_page import PAGE_NAME
from cbq.results import RESULTS_NAME, read_results

EXPERIMENT = "experiment"
FIRST = ("method", "quant")  # what a row is told by before anything else
# A column of its own, or nothing to a result.
NOT_A_ROW = (
    EXPERIMENT,
    "seed",
    "model",
    "tracking",
    "deterministic",
    "offload",
    "activations",
    "debug",
    "evaluation.batch_tokens",
    "evaluation.baselines",
    "evaluation.cache_dir",
)
STATES = {"failed": "failed", "running": "unfinished"}
MISSING = "missing"


@dataclass(frozen=True)
class Value:
    """What one cell of the table says.

    Args:
        numbers: of its finished seeds, those that are finite.
        text: instead of a number, where there is none.
        total: of its seeds, finished or not.
    """

    numbers: tuple[float, ...] = ()
    text: str = ""
    total: int = 0

    @property
    def mean(self) -> float | None:
        """The mean over seeds."""
        return mean(self.numbers) if self.numbers else None

    def format(self, digits: int = 2) -> str:
        """Return mean, range over seeds, and how many of them there are where some are not there.

        Example:
            >>> Value((15.36, 15.4), total=2).format()
            '15.38 (15.36-15.40)'
            >>> Value((15.36,), total=3).format()
            '15.36 [1 of 3]'
        """
        if not self.numbers:
            return self.text
        text = f"{self.mean:.{digits}f}"
        if len(self.numbers) > 1:
            text += f" ({min(self.numbers):.{digits}f}-{max(self.numbers):.{digits}f})"
        return text if len(self.numbers) == self.total else f"{text} [{len(self.numbers)} of {self.total}]"


@dataclass
class SweepTable:
    """A sweep's results.

    Args:
        labels: headings of what tells rows apart.
        columns: headings of values: model and corpus, then seconds and memory of each model.
        rows: a row's labels -> its values by column.
        full_precision: values by column of the models before quantization.
        seeds: how many there are.
        schemes: of the rows that have finished runs: W2A16 is not held against W4A16.
        paper: the paper's figures by column, then by row; `FULL_PRECISION` is a row of its own. A column without one is
            not there.
        pages: of runs that have one, by row and model: the seed, and the path from the sweep's folder.
    """

    labels: list[str]
    columns: list[tuple[str, str]]
    rows: dict[tuple[str, ...], dict[tuple[str, str], Value]]
    full_precision: dict[tuple[str, str], Value] = field(default_factory=dict)
    seeds: int = 1
    schemes: dict[tuple[str, ...], str] = field(default_factory=dict)
    paper: dict[tuple[str, str], dict[tuple[str, ...], float]] = field(default_factory=dict)
    pages: dict[tuple[str, ...], dict[str, list[tuple[str, str]]]] = field(default_factory=dict)

    @property
    def corpora(self) -> set[str]:
        """What perplexity is measured on."""
        return {what for _, what in self.columns if not is_task(what)} - COSTS

    def names(self, row: tuple[str, ...]) -> tuple[str, ...]:
        """Return a row's labels, without the table's name where all experiments are of one table."""
        tables = {row[0].partition("_")[0] for row in self.rows} if self.labels[:1] == [EXPERIMENT] else set()
        return (row[0].removeprefix(f"{tables.pop()}_"), *row[1:]) if len(tables) == 1 else row

    def best(self, column: tuple[str, str]) -> set[tuple[str, ...]]:
        """Return the rows whose mean is the best of a column, among two or more of one scheme."""
        choose = max if is_task(column[1]) else min
        means: dict[str, dict[tuple[str, ...], float]] = {}
        for row, scheme in self.schemes.items():
            value = self.rows[row][column].mean
            if value is not None:
                means.setdefault(scheme, {})[row] = value
        return {
            row
            for rows in means.values()
            if len(rows) > 1
            for row, value in rows.items()
            if value == choose(rows.values())
        }


def read_sweep(folder: Path) -> list[dict]:
    """Return the results of all runs below a folder, in the order of their paths, each with the path of its `page`.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder")
    found = []
    for path in sorted(folder.rglob(RESULTS_NAME)):
        page = path.with_name(PAGE_NAME)
        place = page.relative_to(folder).as_posix() if page.is_file() else ""
        found.append(read_results(path.parent) | {"page": place})
    if not found:
        raise InputError(f"no run below {folder}: there is no {RESULTS_NAME}")
    return found


def sweep_table(runs: Sequence[dict], expected: Iterable[str] = ()) -> SweepTable:
    """Return the table of some runs.

    Rows are experiments, if the runs are of experiments, and whatever else differs between runs of one experiment.

    Args:
        runs: contents of `results.json`.
        expected: names of experiments that belong to the table; those without a run are rows too.
    """
    labels = [EXPERIMENT] if any(EXPERIMENT in run["settings"] for run in runs) else []
    labels += telling(runs)
    columns = value_columns(runs)
    grouped: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    for run in runs:
        row = tuple(str(run["settings"].get(label, "-")) for label in labels)
        grouped.setdefault(row, {}).setdefault(run["model"], []).append(run)
    rows = {row: row_values(by_model, columns) for row, by_model in grouped.items()}
    present = {row[0] for row in rows} if labels else set()
    for name in expected:
        if name not in present:
            row = (name, *["-"] * (len(labels) - 1))
            rows[row] = {column: Value(text=MISSING) for column in columns}
    if labels[:1] == [EXPERIMENT]:
        rows = dict(sorted(rows.items(), key=lambda item: place(item[0][0])))
    full_precision = {}
    for model, corpus in columns:
        found = {figure_of(run, corpus, "full_precision") for run in runs if run["model"] == model}
        if numbers := tuple(sorted(number for number in found if number is not None)):
            full_precision[model, corpus] = Value(numbers, total=len(numbers))
    schemes = {
        row: run["scheme"]
        for row, by_model in grouped.items()
        for each in by_model.values()
        for run in each
        if run["status"] == "finished"
    }
    pages = {
        row: {
            model: [(str(run["seed"]), run["page"]) for run in each if run.get("page")]
            for model, each in by_model.items()
        }
        for row, by_model in grouped.items()
    }
    seeds = len({run["seed"] for run in runs})
    paper = paper_columns(runs, columns, rows)
    return SweepTable(labels, columns, rows, full_precision, seeds, schemes, paper, pages)


def paper_columns(
    runs: Sequence[dict], columns: Sequence[tuple[str, str]], rows: Iterable[tuple[str, ...]]
) -> dict[tuple[str, str], dict[tuple[str, ...], float]]:
    """Return the paper's figures of the columns that measure what it did, as far as it has any.

    None where rows are told apart by more than their experiment: the paper has one of them at most.
    """
    found: dict[tuple[str, str], dict[tuple[str, ...], float]] = {}
    if any(len(row) != 1 for row in rows):
        return found
    for column in filter(lambda column: comparable(runs, column), columns):
        figures = {row: figure(row[0], column) for row in [(FULL_PRECISION,), *rows] if row}
        if any(number is not None for row, number in figures.items() if row != (FULL_PRECISION,)):
            found[column] = {row: number for row, number in figures.items() if number is not None}
    return found


def telling(runs: Sequence[dict]) -> list[str]:
    """Return settings that tell the runs of one experiment apart: a choice before what follows from it.

    Example:
        >>> runs = [{"settings": {"rounding.rank": 5, "rounding": kind, "seed": 0}} for kind in ("lora", "nearest")]
        >>> telling(runs)
        ['rounding']
    """
    keys = dict.fromkeys(key for run in runs for key in run["settings"])
    keys = list(filter(tells_rows, keys))
    told: list[str] = []
    for key in sorted(keys, key=lambda key: (*(key != first for first in FIRST), "." in key)):
        values: dict[tuple[str, ...], set[str]] = {}
        for run in runs:
            row = tuple(str(run["settings"].get(label, "-")) for label in (EXPERIMENT, *told))
            values.setdefault(row, set()).add(str(run["settings"].get(key, "-")))
        if any(len(each) > 1 for each in values.values()):
            told.append(key)
    return told


def tells_rows(key: str) -> bool:
    """Return whether a setting may tell rows apart.

    Example:
        >>> tells_rows("cbd.window"), tells_rows("tracking.mode")
        (True, False)
    """
    return key not in NOT_A_ROW and key.partition(".")[0] not in NOT_A_ROW


def value_columns(runs: Sequence[dict]) -> list[tuple[str, str]]:
    """Return each model with each of its corpora and tasks, then with time and memory."""
    columns: dict[tuple[str, str], None] = {}
    for run in sorted(runs, key=lambda run: run["model"]):
        columns |= dict.fromkeys((run["model"], what) for what in measured(run))
    for model in sorted({run["model"] for run in runs}):
        columns |= {(model, SECONDS): None, (model, MEMORY): None}
    return list(columns)


def row_values(by_model: dict[str, list[dict]], columns: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Value]:
    """Return the values of one row.

    Args:
        by_model: its runs, one a seed.
        columns: what to say of them.
    """
    values = {}
    for model, what in columns:
        runs = by_model.get(model, [])
        finished = [run for run in runs if run["status"] == "finished"]
        did = [run for run in finished if what in COSTS or what in measured(run)]
        numbers = [number for run in did if (number := value_of(run, what)) is not None]
        states = sorted({STATES.get(run["status"], "") for run in runs} - {""})
        text = "not finite" if did else ", ".join(states) or ("-" if runs else MISSING)
        values[model, what] = Value(tuple(numbers), text, len(runs))
    return values


def value_of(run: dict, what: str) -> float | None:
    """Return what a finished run says: of a corpus, a task, its seconds or its memory."""
    return cost_of(run, what) if what in COSTS else figure_of(run, what, "quantized")
