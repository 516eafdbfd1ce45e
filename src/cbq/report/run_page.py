"""`report.html` of one run, from what is in its folder."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from cbq.cost import format_duration
from cbq.errors import InputError
from cbq.report import charts, cost_charts
from cbq.report.observer import FOLDER_NAME
from cbq.report.page import Figure, Section, render, write_figures
from cbq.report.scores import STATES, headline, with_error
from cbq.report.summary import CONTROL_CHARACTERS, gap_closed
from cbq.results import RESULTS_NAME, read_results

PAGE_NAME = "report.html"


def write_run_page(folder: Path) -> Path:
    """Write `<folder>/report.html`, and each of its figures as PNG and SVG into `<folder>/report/figures/`.

    Args:
        folder: of a finished run.

    Raises:
        InputError: there is no finished run.
    """
    results = read_results(folder)
    if results is None or results["status"] != "finished":
        raise InputError(f"{folder} holds no finished run: its {RESULTS_NAME} says {results and results['status']!r}")
    steps, blocks = (read_table(folder / name) for name in ("metrics.csv", "blocks.csv"))
    outliers = read_json(folder / FOLDER_NAME / "outliers.json")
    weights = [read_json(path) for path in sorted((folder / FOLDER_NAME / "weights").glob("block_*.json"))]
    texts = read_json(folder / FOLDER_NAME / "texts.json").get("texts", {})
    sections = [
        Section("Result", tables=[*summary_tables(results)]),
        Section(
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
                    charts.windows(results),
                ),
            ],
        ),
        Section(
            "Blocks and linears",
            figures=[
                Figure(
                    "error",
                    "Quantization error of each linear: |W_q - W|² / |W|²",
                    charts.heat_map(blocks, "error", "error", "~g"),
                ),
                Figure(
                    "changed",
                    "Share of integers that are not round-to-nearest's",
                    charts.heat_map(blocks, "changed", "share", "~%"),
                ),
                Figure(
                    "signal_to_noise",
                    "Signal-to-noise ratio of every block's output on held-out text",
                    charts.signal_to_noise(results),
                ),
            ],
        ),
        Section(
            "Outliers",
            "The largest magnitude of each channel on some calibration segments, before and after preprocessing, and "
            "Algorithm 1's thresholds: above the coarse one a channel may be an outlier, above the fine one it is.",
            figures=[
                Figure(
                    "outliers_activations",
                    "Channels of activations: the block, and the module that puts them out",
                    charts.outliers(outliers.get("activations", []), "largest |x|"),
                ),
                Figure(
                    "outliers_weights",
                    "Output channels of weights: what the grid covers",
                    charts.outliers(outliers.get("weights", []), "largest |w| covered"),
                ),
            ],
        ),
        Section(
            "Weights on the grid",
            figures=[
                Figure(
                    "weights",
                    "Where the weights lie (bars), and the integers that they got (stems)",
                    charts.weights(weights),
                )
            ],
        ),
        Section(
            "Time and memory",
            figures=[
                Figure("time", "What the time went into", cost_charts.time_line(results)),
                Figure("memory", "Memory held", cost_charts.memory(steps)),
            ],
        ),
        Section(
            "What it writes",
            texts={
                title: CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text.strip())
                for title, text in texts.items()
            },
        ),
        Section(
            "How to get this again",
            code=reproduce(results),
            tables=[environment_table(results), settings_table(results)],
        ),
    ]
    title = f"{results['model']} {results['scheme']} {results['method']}"
    subtitle = f"seed {results['seed']}, {len(results['windows'])} windows, {folder.resolve().name}"
    page = render(title, subtitle, sections)
    write_figures(folder / FOLDER_NAME / "figures", sections)
    path = folder / PAGE_NAME
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def read_table(path: Path) -> pd.DataFrame:
    """Return a CSV file, without rows where there is none."""
    return pd.read_csv(path) if path.is_file() and path.stat().st_size else pd.DataFrame()


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file, an empty object where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def summary_tables(results: Mapping) -> list[pd.DataFrame]:
    """Return the figures that a run is known by."""
    tables = []
    if results["perplexity"]:
        rows = []
        for corpus, row in results["perplexity"].items():
            closed = gap_closed(row["full_precision"], row["rtn"], row["quantized"])
            agreement = results["agreement"].get(corpus, {})
            rows.append(
                {
                    "perplexity": corpus,
                    "full precision": number(row["full_precision"]),
                    "round-to-nearest": number(row["rtn"]),
                    "quantized": number(row["quantized"]),
                    "gap closed": "-" if closed is None else f"{closed:.1%}",
                    "KL, nats a token": number(agreement.get("kl_divergence")),
                    "same first choice": f"{agreement['top1']:.1%}" if agreement else "-",
                }
            )
        tables.append(pd.DataFrame(rows))
    if results["zero_shot"]:
        rows = []
        for task, row in results["zero_shot"].items():
            metric = headline(row["quantized"])
            cells = {state.replace("_", " "): with_error(row[state], metric) for state in STATES}
            rows.append({"task": f"{task} {metric}"} | cells)
        tables.append(pd.DataFrame(rows))
    cost = results["cost"]
    device = cost["peak_device_memory_gib"]
    facts = {
        "effective bits a weight": f"{results['effective_bits']:.3f}",
        "time": format_duration(cost["wall_time_seconds"]),
        "of it reconstruction": format_duration(cost["reconstruction_seconds"]),
        "peak memory": f"{cost['peak_host_memory_gib']:.1f} GiB"
        + ("" if device is None else f", GPU {device:.1f} GiB"),
        "calibration": f"{cost['calibration_tokens']:,} tokens of {results['protocol']['calibration']['name']}",
        "guard": "; ".join(f"window {n}: {w['guard']}" for n, w in enumerate(results["windows"]) if w["guard"])
        or "not needed",
    }
    return [*tables, pd.DataFrame([facts])]


def number(value: float | None) -> str:
    """Return a number with four digits; `-` for none."""
    return "-" if value is None else f"{value:.4g}"


def reproduce(results: Mapping) -> str:
    """Return the commands that make the same run, every option written out; other machines may round otherwise."""
    environment = results["environment"]
    commit = environment["git_commit"] or ""
    first = f"git checkout {commit.removesuffix('-dirty')}" if commit else f"pip install cbq=={environment['cbq']}"
    if commit.endswith("-dirty"):
        first += "  # and the changes that were not committed"
    choices = [word(key, value) for key, value in results["settings"].items() if "." not in key and key != "name"]
    options = [word(key, value) for key, value in results["settings"].items() if "." in key and value is not None]
    return " \\\n  ".join([f"{first}\npython run.py {' '.join(choices)}", *options])


def word(key: str, value: Any) -> str:
    """Return an option as a shell's word that hydra reads.

    Example:
        >>> print(word("evaluation.corpora", ["c4", "embedded"]), word("cbd.overlap", None), word("a.b", True))
        'evaluation.corpora=[c4,embedded]' cbd.overlap=null a.b=true
    """
    return shlex.quote(f"{key}={plain(value)}")


def plain(value: Any) -> str:
    """Return a value in hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{plain(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./-]+", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


def environment_table(results: Mapping) -> pd.DataFrame:
    """Return the software and the machine."""
    return pd.DataFrame({"environment": results["environment"].keys(), "": map(str, results["environment"].values())})


def settings_table(results: Mapping) -> pd.DataFrame:
    """Return every option."""
    return pd.DataFrame({"option": results["settings"].keys(), "value": map(str, results["settings"].values())})
