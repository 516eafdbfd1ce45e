import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from cbq.report.summary import gap_closed, print_summary

RESULTS = {
    "model": "pico",
    "scheme": "W2A16",
    "method": "cbq",
    "windows": [{"changed_integers": 0.0}, {"changed_integers": 0.2}],
    "perplexity": {
        "embedded": {"full_precision": 5.0, "rtn": 9.0, "quantized": 6.0},
        "wikitext2": {"full_precision": 5.678, "rtn": 12345.6, "quantized": 7.125},
        "worse": {"full_precision": 10.0, "rtn": 12.0, "quantized": 13.0},
        "broken": {"full_precision": 5.0, "rtn": float("inf"), "quantized": 3.2e9},
        "alone": {"full_precision": None, "rtn": None, "quantized": 6.0},
        "no gap": {"full_precision": 5.0, "rtn": 5.0, "quantized": 5.0},
    },
    "zero_shot": {},
    "agreement": {},
    "cost": {
        "wall_time_seconds": 252.0,
        "reconstruction_seconds": 200.4,
        "evaluation_seconds": 40.0,
        "peak_host_memory_gib": 1.94,
        "peak_device_memory_gib": None,
    },
}
TEXTS = {"Before": "[bold]if[/bold] x[0] == [/]:", "After, 2 bits": "return \x1b[31mself\x07\n    [link=a]end"}


def show(folder: Path, results: dict = RESULTS, terminal: bool = False, texts: dict[str, str] = TEXTS) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    print_summary(console, results, texts, folder)
    return console.file.getvalue()


def cells(output: str, corpus: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.strip().startswith(corpus + "  "))
    return re.split(r" {2,}", line.strip())


def test_table(tmp_path):
    output = show(tmp_path)
    assert "Perplexity of pico, W2A16" in output
    assert cells(output, "corpus") == ["corpus", "full precision", "round-to-nearest", "CBQ", "gap closed"]
    assert cells(output, "embedded") == ["embedded", "5.00", "9.00", "6.00", "75.0%"]
    assert cells(output, "wikitext2") == ["wikitext2", "5.68", "12,346", "7.12", "100.0%"]
    assert cells(output, "worse") == ["worse", "10.00", "12.00", "13.00", "-50.0%"]
    assert cells(output, "broken") == ["broken", "5.00", "not finite", "3.20e+09", "-"]
    assert cells(output, "alone") == ["alone", "-", "-", "6.00", "-"]
    assert cells(output, "no gap") == ["no gap", "5.00", "5.00", "5.00", "-"]


def test_nothing_learned_is_not_called_the_method(tmp_path):
    assert cells(show(tmp_path, RESULTS | {"windows": [{"changed_integers": 0.0}]}), "corpus")[3] == "quantized"


def test_the_method_names_the_column(tmp_path):
    assert cells(show(tmp_path, RESULTS | {"method": "gptq"}), "corpus")[3] == "GPTQ"


def test_generated_text_is_literal_and_harmless(tmp_path):
    output = show(tmp_path)
    assert "Before\n[bold]if[/bold] x[0] == [/]:\n" in output
    assert "After, 2 bits\nreturn \ufffd[31mself\ufffd\n    [link=a]end\n" in output
    assert output.index("Before") < output.index("After")


def test_cost(tmp_path):
    assert "Cost       4:12 (reconstruction 3:20, evaluation 0:40), peak memory 1.9 GiB\n" in show(tmp_path)
    results = RESULTS | {"cost": RESULTS["cost"] | {"peak_device_memory_gib": 31.26}}
    assert "peak memory 1.9 GiB host, 31.3 GiB device\n" in show(tmp_path, results)


def test_paths_are_whole_and_only_those_that_exist(tmp_path):
    folder = tmp_path / ("a long name with spaces [1] " * 4).strip()
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    (folder / "metrics.csv").write_text("cbq_step")
    written = [
        f"Checkpoint {folder}/checkpoint",
        f"Results    {folder}/results.json",
        f"Curves     {folder}/metrics.csv",
    ]
    assert show(folder).splitlines()[-3:] == written
    (folder / "wandb").mkdir()
    assert show(folder).splitlines()[-4:] == [*written, f"W&B        {folder}/wandb"]


def test_80_columns_and_no_ansi_in_a_file(tmp_path):
    output = show(Path("outputs"))
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 80
    assert "…" not in output
    assert "\x1b[1m" in show(Path("outputs"), terminal=True)  # bold titles on a terminal


def test_a_long_corpus_name_leaves_the_numbers_alone(tmp_path):
    perplexity = {"a-corpus-with-quite-a-long-name": {"full_precision": 5.0, "rtn": 123456.0, "quantized": 6.0}}
    output = show(tmp_path, RESULTS | {"perplexity": perplexity})
    assert re.search(r"5\.00 +123,456 +6\.00 +100\.0%", output)
    assert max(map(len, output.split("Cost")[0].splitlines())) <= 80


def test_without_perplexities_and_texts(tmp_path):
    output = show(tmp_path, RESULTS | {"perplexity": {}}, texts={})
    assert output.split()[:2] == ["Cost", "4:12"]


@pytest.mark.parametrize(
    ("full_precision", "rtn", "quantized", "expected"),
    [
        (5.0, 9.0, 5.0, 1.0),
        (5.0, 9.0, 9.0, 0.0),
        (5.0, 9.0, 4.0, 1.25),
        (5.0, 4.0, 4.5, None),
        (5.0, 5.0, 4.0, None),
        (5.0, None, 6.0, None),
        (5.0, float("inf"), 6.0, None),
        (5.0, 9.0, float("nan"), None),
    ],
)
def test_gap_closed(full_precision, rtn, quantized, expected):
    assert gap_closed(full_precision, rtn, quantized) == expected
