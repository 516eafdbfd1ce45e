"""`cbq report`: a run's folder as a page, a sweep's as a table and a plot."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cbq.errors import InputError
from cbq.report.common import common_lines
from cbq.report.observer import FOLDER_NAME
from cbq.report.page import Figure, Section, render
from cbq.report.paper import CAVEAT
from cbq.report.pareto import pareto_chart, plot
from cbq.report.render import html_cells, latex, markdown
from cbq.report.run_page import write_run_page
from cbq.report.sweep import EXPERIMENT, SweepTable, read_sweep, sweep_table
from cbq.results import RESULTS_NAME

NAMES = {"markdown": "report.md", "html": "report.html", "latex": "report.tex", "plot": "report.png"}


def report_folder(folder: str, experiments: Sequence[str]) -> None:
    """Write the report of a folder: a run's page where it holds a run, else the table of the sweep below it.

    Args:
        folder: of a run or a sweep.
        experiments: see `SweepReport`.

    Raises:
        InputError: there is neither, or it cannot be written to.
    """
    sweep = SweepReport(folder, experiments)
    if not (sweep.folder / RESULTS_NAME).is_file():
        sweep.run()
        return
    try:
        path = write_run_page(sweep.folder)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to: {error.strerror}") from None
    Console(highlight=False).print(
        Text(f"{path}, its figures in {path.parent / FOLDER_NAME / 'figures'}"), soft_wrap=True
    )


class SweepReport:
    """Writes `report.md`, `report.html`, `report.tex` and `report.png` into a sweep's folder, and shows the table.

    Args:
        folder: of the sweep: every run below it counts.
        experiments: names of all experiments there are; those of a table that the sweep has runs of belong to it.
    """

    def __init__(self, folder: str, experiments: Sequence[str]) -> None:
        if not isinstance(folder, str) or not folder:
            raise InputError(f"cbq report needs the folder of a sweep, got {folder!r}: cbq report multirun/table3c")
        self.folder = Path(folder)
        self.experiments = experiments

    def run(self) -> SweepTable:
        """Write the four files, and return the table.

        Raises:
            InputError: there is no run below the folder, or it cannot be written to.
        """
        runs = read_sweep(self.folder)
        tables = {run["settings"].get(EXPERIMENT, "").partition("_")[0] for run in runs} - {""}
        table = sweep_table(runs, [name for name in self.experiments if name.partition("_")[0] in tables])
        notes = describe(runs, table)
        try:
            self._write(table, notes)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written to: {error.strerror}") from None
        console = Console(highlight=False)
        console.print(Text(markdown(table)), soft_wrap=True)
        console.print(Text(f"{', '.join(NAMES.values())} in {self.folder}"), soft_wrap=True)
        return table

    def _page(self, table: SweepTable, notes: Sequence[str]) -> str:
        figures = [Figure("pareto", "Perplexity over time: point at a dot for its row", pareto_chart(table))]
        sections = [Section("Table", tables=[html_cells(table)], notes=notes), Section("Cost", figures=figures)]
        return render(self.folder.resolve().name, f"{len(table.rows)} rows", sections)

    def _write(self, table: SweepTable, notes: Sequence[str]) -> None:
        picture = self.folder / NAMES["plot"]
        drawn = plot(table, picture)
        text = markdown(table, notes)
        text += f"\n![perplexity over time]({NAMES['plot']})\n" if drawn else ""
        for name, content in (
            ("markdown", text),
            ("html", self._page(table, notes)),
            ("latex", latex(table, notes)),
        ):
            (self.folder / NAMES[name]).write_text(content, encoding="utf-8")


def describe(runs: Sequence[dict], table: SweepTable) -> list[str]:
    """Return what a reader has to know of the numbers: what was done, seeds, commits and machines."""
    environments = [run["environment"] for run in runs]
    commits = sorted({str(each["git_commit"] or each["cbq"])[:12] for each in environments})
    devices = sorted({each["device_name"] or f"{each['device']}, {each['cores']} cores" for each in environments})
    seeds = "one seed" if table.seeds == 1 else f"mean (range) over up to {table.seeds} seeds"
    return [
        *common_lines(runs, table.labels),
        f"Perplexity, lower is better, and scores of tasks in percent, higher is better: {seeds}; the best of a column "
        "and scheme in bold. Seconds are reconstruction's, GiB the peak.",
        f"Commit {', '.join(commits)}; {', '.join(devices)}.",
        *([CAVEAT] if table.paper else []),
    ]
