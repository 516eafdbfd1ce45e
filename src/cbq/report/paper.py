"""The paper's figures, for the columns that measure what it measured."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import yaml

from cbq.report.columns import COSTS

FULL_PRECISION = "full_precision"
SEGMENT_TOKENS = 2048  # of calibration and evaluation
CALIBRATION = {"name": "c4", "num_segments": 128, "segment_tokens": SEGMENT_TOKENS}
CAVEAT = (
    "The paper's figures are of its own code, options and GPU; options typed beside an experiment are not compared. It "
    "says per channel, but its weight-only baselines are those of groups (its OmniQuant at W2A16 on LLaMA-2-7B is "
    "OmniQuant's for groups of 64): no target for group_size=-1."
)


@cache
def figures() -> dict[str, dict[str, dict[str, float]]]:
    """Return experiment -> model -> corpus, seconds or GiB -> the paper's figure, in the paper's order."""
    return yaml.safe_load(Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8"))


def place(experiment: str) -> int:
    """Return where the paper has an experiment: after all others if it does not."""
    order = list(figures())
    return order.index(experiment) if experiment in order else len(order)


def comparable(runs: Sequence[dict], column: tuple[str, str]) -> bool:
    """Return whether a column measures what the paper did: every run of the model is by its protocol.

    The protocol is calibration and evaluation; what else a user changed is not looked at.

    Args:
        runs: contents of `results.json`.
        column: model, and corpus, seconds or GiB.

    Source: section 5.1.
    """
    model, what = column
    protocols = [run["protocol"] for run in runs if run["model"] == model and "protocol" in run]
    calibrated = all(CALIBRATION.items() <= protocol.get("calibration", {}).items() for protocol in protocols)
    # Results of before there was a stride have none.
    evaluated = what in COSTS or all(
        found.get("segment_tokens") == found.get("stride", SEGMENT_TOKENS) == SEGMENT_TOKENS
        for found in (protocol.get(what, {}) for protocol in protocols)
    )
    return bool(protocols) and calibrated and evaluated


def figure(experiment: str, column: tuple[str, str]) -> float | None:
    """Return the paper's figure of an experiment, or of `FULL_PRECISION`, or None.

    Example:
        >>> figure("table7_w8_o7", ("llama7b", "wikitext2"))
        8.96
        >>> figure("table7_w8_o7", ("pico", "wikitext2")) is None
        True
    """
    model, what = column
    return figures().get(experiment, {}).get(model, {}).get(what)
