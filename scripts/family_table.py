"""Writes docs/families.md: every family against every test of it, with the losses of a small model.

    python scripts/family_table.py

Runs `tests/models/test_families.py` (two or three minutes) and writes down what passed; no network.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "test_every_matrix_of_a_block_is_a_linear_of_a_scheme": "every matrix claimed",
    "test_replayed_blocks_are_the_plain_forward": "replay = forward",
    "test_scaling_keeps_the_function_and_reaches_every_claimed_channel": "scaling keeps the function",
    "test_cfp_keeps_the_function_and_removes_outliers": "CFP",
    "test_queries_keys_and_values_can_be_reached_or_are_refused": "quantized q, k, v",
    "test_cbq_from_end_to_end[w4a4": "W4A4",
    "test_cbq_from_end_to_end[w2a16": "W2A16",
}
HEAD = """# Model families

Made by `python scripts/family_table.py`, which runs `tests/models/test_families.py`: each row is a model of four blocks
and a width of 64 with random weights, built from a configuration of transformers, with one channel eight times as large
between every producer and its consumers. For W4A4 and W2A16: the loss of round-to-nearest -> of CBQ, summed over
windows (`dense_ste`, CFP, three epochs over six segments of 32 tokens; no guard). Then the model is saved, loaded again
by `cbq.load` (equal to the bit) and by plain transformers (equal to the bit where weights alone are quantized; with
experts within 1e-4, for transformers sums them in another order).

- *every matrix claimed*: each parameter of a block with two or more dimensions is quantized, or excluded for a reason
  that the family's row states: the routers of experts.
- *replay = forward*: blocks called as the model calls them give the plain forward, in batches of any size.
- *CFP*: the function is kept, and an outlier channel gets smaller.
- *quantized q, k, v*: `quant.qkv_bits`; *refused* where attention is the model's own.

In a mixture of experts preprocessing, GPTQ, AdaRound and learned channel scales see every token in every expert. A
window's own loss is the model's, with its routing: an expert that it sends no token to stays as it was rounded at the
start. `results.json` counts the tokens that each is sent (`expert_tokens`), and few ones are said.

"""


class Outcomes:
    """Collects what pytest found."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep a test's outcome by its model and its title."""
        name = report.nodeid.rpartition("::")[2]
        title = next((title for start, title in TESTS.items() if name.startswith(start)), None)
        if title is None or (report.when != "call" and report.passed):
            return
        model = name.removesuffix("]").partition("[")[2].removeprefix(f"{title.lower()}-")
        losses = dict(report.user_properties)
        text = "yes" if report.passed else "**no**"
        if report.passed and "learned" in losses:
            text = f"{losses['nearest']:.3g} -> {losses['learned']:.3g}"
        self.cells.setdefault(model, {})[title] = text


def main() -> None:
    """Run the tests and write the page; the exit code is pytest's."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]
    from tiny_models import tiny_model

    from cbq.models.families import find_family

    outcomes = Outcomes()
    tests = str(ROOT / "tests" / "models" / "test_families.py")
    code = pytest.main([tests, "-p", "no:cacheprovider", "-m", "slow or not slow"], [outcomes])
    titles = list(TESTS.values())
    lines = [["family", *titles], ["---"] * (len(titles) + 1)]
    for model, cells in outcomes.cells.items():
        if find_family(tiny_model(model).config).attention is None and cells.get("quantized q, k, v") == "yes":
            cells["quantized q, k, v"] = "refused"
        lines.append([f"`{model}`", *(cells.get(title, "not run") for title in titles)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    (ROOT / "docs" / "families.md").write_text(f"{HEAD}{table}\n", encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
