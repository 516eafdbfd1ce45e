"""`cbq runs`: what has been run, a line a run."""

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cbq.cost import format_duration
from cbq.errors import InputError
from cbq.report.summary import format_perplexity
from cbq.results import RESULTS_NAME, read_results

DEFAULT_FOLDERS = ("outputs", "multirun")
WIDEST = 10_000  # characters: a line is never cut
Run = dict[str, Any]
# What runs can be sorted by: the smallest first. None, where a figure was not measured, comes last.
KEYS: dict[str, Callable[[Run], Any]] = {
    "finished": lambda run: run["finished"],
    "perplexity": lambda run: next(iter(run["perplexity"].values()), {}).get("quantized"),
    "seconds": lambda run: run["cost"]["wall_time_seconds"],
    "bits": lambda run: run["effective_bits"],
    "model": lambda run: run["model"],
    "scheme": lambda run: run["scheme"],
    "method": lambda run: run["method"],
    "folder": lambda run: run["folder"],
}


class RunList:
    """Shows the finished runs below a folder as a table, and names the others.

    Args:
        folder: None: `outputs` and `multirun`, as far as they are there.
        sort: one of `KEYS`; with a minus in front of it the other way round.

    Raises:
        InputError: there is no such folder or no such key.
    """

    def __init__(self, folder: str | None = None, sort: str = "finished") -> None:
        if not isinstance(sort, str) or sort.removeprefix("-") not in KEYS:
            raise InputError(f"sort must be one of {', '.join(KEYS)}, or one of them after a minus, got {sort!r}")
        if folder is not None and not (isinstance(folder, str) and Path(folder).is_dir()):
            raise InputError(f"{folder} is no folder")
        self.folders = [Path(folder)] if folder else [Path(name) for name in DEFAULT_FOLDERS]
        self.sort = sort

    def run(self) -> list[Run]:
        """Print the table and return what it shows."""
        found, unread = [], []
        for path in (path for folder in self.folders for path in sorted(folder.rglob(RESULTS_NAME))):
            try:
                found.append(read(path))
            except InputError as error:  # of another program, or damaged: no reason not to show the others
                unread.append(f"not read: {error}")
        shown = in_order([run for run in found if run["status"] == "finished"], self.sort)
        left = [run for run in found if run["status"] != "finished"]
        others = [f"{run['status']}: {run['folder']}  {run.get('error', '')}".rstrip() for run in left]
        console = Console(highlight=False)
        if shown:
            rows = table(shown)
            # Beyond the terminal rather than cut: a path in pieces cannot be copied.
            console.width = max(console.width, Console(width=WIDEST).measure(rows).maximum)
            console.print(rows)
        for line in [*others, *unread]:
            console.print(Text(line), soft_wrap=True)
        count = f", {len(left)} unfinished or failed" if left else ""
        where = " and ".join(map(str, self.folders))
        console.print(Text(f"{len(shown)} finished runs below {where}{count}"), soft_wrap=True)
        return shown


def read(path: Path) -> Run:
    """Return the content of a `results.json`, with its folder, and when it was written (seconds since 1970).

    Raises:
        InputError: it is no run's.
    """
    results = read_results(path.parent)
    if results is None or "status" not in results:
        raise InputError(f"{path} is of no run")
    return results | {"folder": str(path.parent), "finished": path.stat().st_mtime}


def in_order(runs: Sequence[Run], sort: str) -> list[Run]:
    """Return runs sorted by a key; those without a value come last, whichever way round.

    Example:
        >>> [run["model"] for run in in_order([{"model": "a"}, {"model": "b"}], "-model")]
        ['b', 'a']
    """
    key = KEYS[sort.removeprefix("-")]
    known = sorted((run for run in runs if key(run) is not None), key=key, reverse=sort.startswith("-"))
    return known + [run for run in runs if key(run) is None]


def table(runs: Sequence[Run]) -> Table:
    """Return runs as a table: perplexity of the first corpus, quantized and in full precision."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("finished", "model", "scheme", "method", "seed"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("perplexity", "full precision", "time"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("folder", no_wrap=True)
    for run in runs:
        perplexity = next(iter(run["perplexity"].values()), {})
        shown.add_row(
            datetime.fromtimestamp(run["finished"]).strftime("%Y-%m-%d %H:%M"),
            *(Text(str(run[key])) for key in ("model", "scheme", "method", "seed")),
            *(format_perplexity(perplexity.get(key)) for key in ("quantized", "full_precision")),
            format_duration(run["cost"]["wall_time_seconds"]),
            Text(run["folder"]),
        )
    return shown
