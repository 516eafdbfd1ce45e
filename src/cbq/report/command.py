"""`cbq report`: a run's folder as a page, a sweep's as a table and a plot."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cbq.errors import InputError
from cbq.report.again import sweep_again
from cbq.report.common import common_lines, shared_settings
from cbq.report.observer import FOLDER_NAME
from cbq.report.page import Figure, Section, render, write_chart
from cbq.report.paper import CAVEAT
from cbq.report.pareto import panels, pareto_chart
from cbq.report.render import html_cells, latex, markdown
from cbq.report.run_page import PAGE_NAME, write_run_page
from cbq.report.run_tables import two_columns
from cbq.report.sweep import EXPERIMENT, SweepTable, read_sweep, sweep_table
from cbq.results import RESULTS_NAME

PICTURE = "report"  # .png, .svg


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
    """Writes a sweep's table into its folder, as `report.md`, `.html`, `.tex`, `.png` and `.svg`, and shows it.

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
        """Write the files, and return the table.

        Raises:
            InputError: there is no run below the folder, or it cannot be written to.
        """
        runs = read_sweep(self.folder)
        tables = {run["settings"].get(EXPERIMENT, "").partition("_")[0] for run in runs} - {""}
        table = sweep_table(runs, [name for name in self.experiments if name.partition("_")[0] in tables])
        notes = describe(runs, table)
        try:
            written = self._write(runs, table, notes)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written to: {error.strerror}") from None
        console = Console(highlight=False)
        console.print(Text(markdown(table)), soft_wrap=True)
        console.print(Text(f"{', '.join(written)} in {self.folder}"), soft_wrap=True)
        return table

    def _write(self, runs: Sequence[dict], table: SweepTable, notes: Sequence[str]) -> list[str]:
        """Write the files and return their names; where there is nothing to draw, there is no picture."""
        picture = panels(table)
        text = markdown(table, notes)
        if picture is not None:
            write_chart(picture, self.folder / PICTURE)
            text += f"\n![perplexity over time]({PICTURE}.png)\n"
        texts = {"report.md": text, PAGE_NAME: self._page(runs, table, notes), "report.tex": latex(table, notes)}
        for name, content in texts.items():
            (self.folder / name).write_text(content, encoding="utf-8")
        return [*texts, *([f"{PICTURE}.png", f"{PICTURE}.svg"] if picture is not None else [])]

    def _page(self, runs: Sequence[dict], table: SweepTable, notes: Sequence[str]) -> str:
        caption = "Perplexity over time: point at a dot for its row"
        settings = two_columns(shared_settings(runs), "option", "value")
        sections = [
            Section("Table", tables=[html_cells(table)], notes=notes),
            Section("Cost", figures=[Figure("pareto", caption, pareto_chart(table))]),
            Section("How to get this again", code=sweep_again(runs, self.folder)),
            Section("Configuration", "What is the same in all runs.", tables=[settings]),
        ]
        return render(self.folder.resolve().name, f"{len(table.rows)} rows", sections)


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
