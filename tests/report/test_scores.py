"""What was measured, in lines and tables."""

import io
from types import SimpleNamespace

from rich.console import Console

from cbq.report.scores import agreement_lines, print_scores, score_tables, summary_figures

ACCURACY = {"acc": 0.5, "acc_stderr": 0.0123, "acc_norm": 0.625, "acc_norm_stderr": 0.01}
DIFFERENCE = {"mean": -0.031, "stderr": 0.0104, "p_value": 0.0042, "num_higher": 3, "num_lower": 20}
MEASURED = {
    "perplexity": {"c4": {"full_precision": 7.25, "rtn": 9.0, "quantized": None}},
    "bits_per_byte": {"c4": {"full_precision": 0.7123, "rtn": 0.8, "quantized": None}},
    "zero_shot": {
        "piqa": {"full_precision": ACCURACY, "quantized": ACCURACY, "difference": {"acc": DIFFERENCE}},
        "gsm8k": {
            "full_precision": {},
            "quantized": {"exact_match,strict": 0.25, "exact_match_stderr,strict": float("nan")},
            "difference": {},
        },
    },
    "agreement": {},
}


def shown(renderable) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(renderable)
    return console.file.getvalue()


def rows(table: str) -> dict[str, str]:
    return {" ".join(line.split()[:2]): " ".join(line.split()[2:]) for line in table.splitlines() if line.split()[2:]}


def test_tables():
    texts, tasks = (rows(shown(table)) for table in score_tables(MEASURED))
    assert texts["c4 7.25"] == "(0.7123) -"
    assert tasks["piqa acc"] == "0.500 ±0.012 0.500 ±0.012 -0.031 ±0.010 0.0042"
    assert tasks["piqa acc_norm"] == "0.625 ±0.010 0.625 ±0.010 - -"
    assert tasks["gsm8k exact_match,strict"] == "- 0.250 - -"


def test_nothing_measured_has_no_tables():
    assert score_tables({part: {} for part in MEASURED}) == []


def test_flat_figures_leave_out_what_was_not_measured():
    figures = summary_figures(MEASURED)
    assert figures["perplexity/c4/rtn"] == 9.0
    assert figures["zero_shot/piqa/difference/acc/p_value"] == 0.0042
    assert "perplexity/c4/quantized" not in figures


def test_lines():
    console = Console(file=io.StringIO(), width=80)
    scores = SimpleNamespace(
        texts={"c4": SimpleNamespace(perplexity=7.25)}, tasks={"piqa": SimpleNamespace(metrics=ACCURACY)}
    )
    print_scores(console, scores, "W4A4")
    assert console.file.getvalue().splitlines() == [
        "perplexity of W4A4 on c4: 7.25",
        "piqa of W4A4: acc_norm 0.6250",
    ]


def test_agreement():
    row = {"kl_divergence": 0.01234, "top1": 0.9512, "block_snr_db": [30.0, 25.0, 20.04]}
    assert agreement_lines({"c4": row}) == [
        "on c4: KL 0.0123 nats a token, same first choice 95.1%, "
        "SNR 30.0 dB after the first block, 20.0 dB after the last"
    ]
