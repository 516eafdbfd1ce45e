"""The tables of a run's page."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from cbq.cost import format_duration
from cbq.report.scores import STATES, headline, with_error
from cbq.report.summary import format_perplexity, gap_closed


def summary_tables(results: Mapping) -> list[pd.DataFrame]:
    """Return the figures that a finished run is known by."""
    tables = [perplexities(results), scores(results), facts(results)]
    return [table for table in tables if len(table)]


def perplexities(results: Mapping) -> pd.DataFrame:
    """Return a row a corpus."""
    rows = []
    for corpus, row in results["perplexity"].items():
        closed = gap_closed(row["full_precision"], row["rtn"], row["quantized"])
        agreement = results["agreement"].get(corpus, {})
        divergence, same = agreement.get("kl_divergence"), agreement.get("top1")
        rows.append(
            {
                "perplexity": corpus,
                "full precision": format_perplexity(row["full_precision"]),
                "round-to-nearest": format_perplexity(row["rtn"]),
                "quantized": format_perplexity(row["quantized"]),
                "gap closed": "-" if closed is None else f"{closed:.1%}",
                "KL, nats a token": "-" if divergence is None else f"{divergence:.4g}",
                "same first choice": "-" if same is None else f"{same:.1%}",
            }
        )
    return pd.DataFrame(rows)


def scores(results: Mapping) -> pd.DataFrame:
    """Return a row a task."""
    rows = []
    for task, row in results["zero_shot"].items():
        metric = headline(row["quantized"])
        cells = {state.replace("_", " "): with_error(row[state], metric) for state in STATES}
        rows.append({"task": f"{task} {metric}"} | cells)
    return pd.DataFrame(rows)


def facts(results: Mapping) -> pd.DataFrame:
    """Return what it took, and what came of it besides."""
    cost = results["cost"]
    device = cost["peak_device_memory_gib"]
    guarded = [f"window {number}: {w['guard']}" for number, w in enumerate(results["windows"]) if w["guard"]]
    found = {
        "effective bits a weight": f"{results['effective_bits']:.3f}",
        "time": format_duration(cost["wall_time_seconds"]),
        "of it reconstruction": format_duration(cost["reconstruction_seconds"]),
        "peak memory": f"{cost['peak_host_memory_gib']:.1f} GiB"
        + ("" if device is None else f", GPU {device:.1f} GiB"),
        "calibration": f"{cost['calibration_tokens']:,} tokens of {results['protocol']['calibration']['name']}",
        "guard": "; ".join(guarded) or "not needed",
    }
    return two_columns(found, "this run", "")


def two_columns(rows: Mapping[str, Any], names: str, values: str) -> pd.DataFrame:
    """Return names beside their values; what is None is left out."""
    known = {name: str(value) for name, value in rows.items() if value is not None}
    return pd.DataFrame({names: known.keys(), values: known.values()})
