"""`report.html` of one run, from what is in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from cbq.durable import write_text
from cbq.errors import InputError
from cbq.report import charts, cost_charts, place_charts
from cbq.report.again import reproduce
from cbq.report.observer import FOLDER_NAME
from cbq.report.page import Figure, Section, render, write_figures
from cbq.report.run_tables import summary_tables, two_columns
from cbq.report.stored import StoredFiles
from cbq.report.summary import CONTROL_CHARACTERS
from cbq.results import RESULTS_NAME, read_results

PAGE_NAME = "report.html"
# What `metrics.csv` says of a window that is solved, as `results.json` will.
OF_A_WINDOW = {
    "window/loss_first": "rec_loss_first",
    "window/loss_last": "rec_loss_last",
    "window/loss_rtn": "rec_loss_rtn",
}


def write_run_page(folder: Path) -> Path:
    """Write `<folder>/report.html`, and each of its figures as PNG and SVG into `<folder>/report/figures/`.

    Of a run that is not finished, or failed, it shows what there is; of files that cannot be read it says so.

    Args:
        folder: of a run.

    Raises:
        InputError: there is no run.
    """
    results = read_results(folder)
    if results is None:
        raise InputError(f"{folder} holds no run: there is no {RESULTS_NAME}")
    files = StoredFiles(folder)
    steps = files.table("metrics.csv", "cbq_step", "window")
    windows = solved_windows(results, steps)
    shown = [
        windows_section(steps, windows),
        blocks_section(files.table("blocks.csv", "block"), results.get("agreement", {})),
        outliers_section(files.json(f"{FOLDER_NAME}/outliers.json")),
        weights_section(files),
        cost_section(results, steps),
        Section("What it writes", texts=texts_of(files)),
        Section(
            "How to get this again",
            code=reproduce(results),
            tables=[two_columns(results["environment"], "environment", "")],
        ),
        Section("Configuration", tables=[two_columns(results["settings"], "option", "value")]),
    ]
    sections = [result_section(results, files.unreadable), *shown]
    title = f"{results['model']} {results['scheme']} {results['method']}"
    count = f"{len(windows)} window{'' if len(windows) == 1 else 's'}"
    state = "" if results["status"] == "finished" else f"{results['status']}, "
    page = render(title, f"{state}seed {results['seed']}, {count}, {folder.resolve().name}", sections)
    write_figures(folder / FOLDER_NAME / "figures", sections)
    write_text(folder / PAGE_NAME, page)
    return folder / PAGE_NAME


def solved_windows(results: Mapping, steps: pd.DataFrame) -> list[dict]:
    """Return what became of each window; of a run that is not finished, from its curves."""
    if "windows" in results or not set(OF_A_WINDOW) <= set(steps):
        return results.get("windows", [])
    solved = steps.dropna(subset=list(OF_A_WINDOW)).rename(columns=OF_A_WINDOW)
    return solved[list(OF_A_WINDOW.values())].to_dict("records")


def result_section(results: Mapping, notes: Sequence[str]) -> Section:
    """Return what came out, or why nothing did."""
    tables: Sequence[pd.DataFrame] = ()
    match results["status"]:
        case "finished":
            tables = summary_tables(results)
        case "failed":
            notes = [f"This run failed: {results['error']}", *notes]
        case _:
            notes = ["This run is not finished. If it was stopped, cbq resume=<this folder> goes on with it.", *notes]
    return Section("Result", tables=tables, notes=notes)


def windows_section(steps: pd.DataFrame, windows: Sequence[Mapping]) -> Section:
    """Return the curves, and what became of the windows."""
    return Section(
        "Windows",
        "Each window's blocks are learned together; steps of all windows stand one after the other. Drag to move, "
        "turn the wheel with shift to zoom.",
        figures=[
            Figure(
                "curves",
                "Every step of every window; those of soft rounding say nothing of what hardening leaves",
                charts.curves(steps),
            ),
            Figure(
                "windows",
                "Reconstruction loss of each window with hard rounding, as a share of round-to-nearest's",
                charts.windows(windows),
            ),
        ],
    )


def blocks_section(blocks: pd.DataFrame, agreement: Mapping) -> Section:
    """Return what was done to each block and linear."""
    return Section(
        "Blocks and linears",
        figures=[
            Figure(
                "error",
                "Quantization error of each linear: |W_q - W|\N{WORD JOINER}² / |W|\N{WORD JOINER}²",
                charts.heat_map(blocks, "error", "error", "~g"),
            ),
            Figure(
                "changed",
                "Share of integers that are not round-to-nearest's",
                charts.heat_map(blocks, "changed", "share", "~%"),
            ),
            Figure(
                "signal_to_noise",
                "Signal-to-noise ratio of every block's output on held-out text, before and after",
                charts.signal_to_noise(agreement),
            ),
        ],
    )


def outliers_section(outliers: Mapping) -> Section:
    """Return the paper's Figure 3."""
    return Section(
        "Outliers",
        "The largest magnitude of each channel on some calibration segments, before and after preprocessing, and "
        "Algorithm 1's thresholds: above the coarse one a channel may be an outlier, above the fine one it is.",
        figures=[
            Figure(
                "outliers_activations",
                "Channels of activations: the block, and the module that puts them out",
                place_charts.outliers(outliers.get("activations", []), "largest |x|"),
            ),
            Figure(
                "outliers_weights",
                "Output channels of weights: what the grid covers",
                place_charts.outliers(outliers.get("weights", []), "largest |w| covered"),
            ),
        ],
    )


def weights_section(files: StoredFiles) -> Section:
    """Return where weights lie, and what integers they got."""
    folder = files.folder / FOLDER_NAME / "weights"
    blocks = [files.json(str(path.relative_to(files.folder))) for path in sorted(folder.glob("block_*.json"))]
    chart = place_charts.weights([block for block in blocks if block])
    caption = "Where the weights lie (bars), and the integers that they got (stems)"
    return Section("Weights on the grid", figures=[Figure("weights", caption, chart)])


def cost_section(results: Mapping, steps: pd.DataFrame) -> Section:
    """Return time and memory."""
    time = cost_charts.time_line(results) if "cost" in results else None
    figures = [
        Figure("time", "What the time went into", time),
        Figure("memory", "Memory held", cost_charts.memory(steps)),
    ]
    return Section("Time and memory", figures=figures)


def texts_of(files: StoredFiles) -> dict[str, str]:
    """Return what the model wrote, by title."""
    texts = files.json(f"{FOLDER_NAME}/texts.json").get("texts", {})
    return {title: CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text.strip()) for title, text in texts.items()}
