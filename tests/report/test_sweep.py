"""Which rows and columns a sweep's table has, and what its cells say."""

from pathlib import Path

import pytest

from cbq.errors import InputError
from cbq.report.sweep import Value, read_sweep, sweep_table, telling
from cbq.results import write_results

PERPLEXITY = ("pico", "embedded")


def test_seeds_are_one_row(result):
    runs = [result(16.0 + seed, seed, rounding=kind) for kind in ("lora", "nearest") for seed in (0, 1, 2)]
    table = sweep_table(runs)
    assert table.labels == ["rounding"]
    assert list(table.rows) == [("lora",), ("nearest",)]
    assert table.seeds == 3
    value = table.rows["lora",][PERPLEXITY]
    assert value.mean == pytest.approx(17.0)
    assert value.format() == "17.00 (16.00-18.00)"
    assert table.rows["lora",]["pico", "seconds"].mean == pytest.approx(1700.0)


def test_models_and_corpora_are_columns(result):
    runs = [result(model=model, rounding=kind) for model in ("pico", "big") for kind in ("lora", "nearest")]
    runs[0]["perplexity"]["c4"] = runs[0]["perplexity"]["embedded"] | {"quantized": 20.0}
    table = sweep_table(runs)
    assert table.columns[:3] == [("big", "embedded"), ("pico", "embedded"), ("pico", "c4")]
    assert set(table.columns[3:]) == {(model, what) for model in ("big", "pico") for what in ("seconds", "GiB")}
    assert table.rows["lora",]["pico", "c4"].mean == 20.0
    assert table.rows["nearest",]["pico", "c4"].format() == "-"
    assert table.full_precision[PERPLEXITY].mean == 15.0


def tasks(accuracy: float) -> dict:
    """Return the scores of two tasks as a run has them."""
    metrics = {"acc": accuracy, "acc_stderr": 0.01, "acc_norm": accuracy + 0.1, "acc_norm_stderr": 0.01}
    mutual = {"r@1": accuracy, "r@1_stderr": 0.01, "r@2": 0.8, "r@2_stderr": 0.01, "mrr": 0.7, "mrr_stderr": 0.01}
    return {
        "piqa": {"full_precision": metrics | {"acc_norm": 0.9}, "quantized": metrics, "difference": {}},
        "mutual": {"full_precision": {}, "quantized": mutual, "difference": {}},
    }


def test_tasks_are_columns_in_percent_and_more_is_better(result):
    runs = [result(rounding=kind) | {"zero_shot": tasks(score)} for kind, score in (("lora", 0.6), ("nearest", 0.5))]
    table = sweep_table([*runs, result(rounding="adaround")])
    names = ["embedded", "piqa acc_norm", "mutual mrr", "mutual r@1", "mutual r@2", "seconds", "GiB"]
    assert [what for _, what in table.columns] == names
    assert table.rows["lora",]["pico", "piqa acc_norm"].format() == "70.00"
    assert table.rows["adaround",]["pico", "piqa acc_norm"].format() == "-"
    assert table.best(("pico", "piqa acc_norm")) == {("lora",)}
    assert table.full_precision["pico", "piqa acc_norm"].format() == "90.00"
    assert ("pico", "mutual mrr") not in table.full_precision
    assert table.corpora == {"embedded"}


def test_a_perplexity_among_tasks_is_no_percentage(result):
    words = {"full_precision": {}, "quantized": {"word_perplexity": 12.0}, "difference": {}}
    run = result() | {"zero_shot": {"wikitext": words | {"higher_is_better": {"word_perplexity": False}}}}
    assert [what for _, what in sweep_table([run]).columns] == ["embedded", "seconds", "GiB"]


def test_what_follows_from_a_choice_is_no_label(result):
    runs = [
        result(rounding="lora", **{"rounding.rank": 5}),
        result(rounding="lora_ste", **{"rounding.rank": 5, "rounding.limit": 0.5}),
        result(rounding="nearest"),
    ]
    assert telling(runs) == ["rounding"]
    assert telling([*runs, result(rounding="lora", **{"rounding.rank": 6})]) == ["rounding", "rounding.rank"]


def test_a_preset_comes_before_what_it_chooses(result):
    runs = [
        result(cbd=cbd, quant=quant, method=method)
        for method, cbd in (("cbq", "default"), ("gptq", "blockwise"))
        for quant in ("w4a4", "w2a16")
    ]
    assert telling(runs) == ["method", "quant"]


def test_runs_of_other_options_are_never_taken_for_seeds(result):
    runs = [result(rounding="lora", **{"rounding.rank": rank}) for rank in (3, 4, 5)] + [result(rounding="nearest")]
    assert len(sweep_table(runs).rows) == 4


def test_experiments_are_rows_and_those_without_a_run_are_missing(result):
    runs = [result(experiment="t_a", **{"cbd.window": 1}), result(experiment="t_b", **{"cbd.window": 2})]
    table = sweep_table(runs, expected=["t_a", "t_b", "t_c"])
    assert table.labels == ["experiment"]
    assert [row[0] for row in table.rows] == ["t_a", "t_b", "t_c"]
    assert {value.format() for value in table.rows["t_c",].values()} == {"missing"}
    runs += [result(experiment=name, rounding="dense_ste") for name in ("t_a", "t_b")]
    assert sweep_table(runs).labels == ["experiment", "rounding"]


def test_failed_and_unfinished_cells_show_as_such(result):
    runs = [result(status=status, rounding=status) for status in ("failed", "running")] + [result(rounding="lora")]
    rows = sweep_table(runs).rows
    assert rows["failed",][PERPLEXITY].format() == "failed"
    assert rows["running",][PERPLEXITY].format() == "unfinished"
    some = sweep_table([result(16.0, 0), result(18.0, 1), result(seed=2, status="failed")]).rows[()]
    assert some[PERPLEXITY].format() == "17.00 (16.00-18.00) [2 of 3]"


def test_a_perplexity_that_is_not_finite(result):
    assert sweep_table([result(None)]).rows[()][PERPLEXITY].format() == "not finite"


def test_best_is_the_smallest_mean(result):
    runs = [
        result(value, seed, rounding=kind)
        for kind, pair in {"a": (15.0, 19.0), "b": (16.0, 16.5), "c": (16.2, 16.4)}.items()
        for seed, value in enumerate(pair)
    ]
    runs.append(result(rounding="d", status="failed"))
    assert sweep_table(runs).best(PERPLEXITY) == {("b",)}


def test_best_is_of_one_scheme(result):
    pairs = {"w2a16": (20.0, 19.0), "w4a16": (16.0, 15.5), "w4a4": (17.0,)}
    runs = [result(value, quant=quant, kind=kind) for quant, both in pairs.items() for kind, value in enumerate(both)]
    assert sweep_table(runs).best(PERPLEXITY) == {("w2a16", "1"), ("w4a16", "1")}


def test_value_without_numbers():
    assert Value(text="missing").mean is None


def test_reading_finds_every_run_below(result, tmp_path):
    for name in ("b", "a/deep"):
        write_results(tmp_path / name, result(rounding=name))
    assert [run["settings"]["rounding"] for run in read_sweep(tmp_path)] == ["a/deep", "b"]


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_no_run_is_one_line(tmp_path: Path, name):
    with pytest.raises(InputError, match=r"no run below|is no folder"):
        read_sweep(tmp_path / name)
