"""The paper's figures beside ours: which, and when."""

import re
from pathlib import Path

import pytest

from cbq.cli import conf_dir
from cbq.report.command import describe
from cbq.report.paper import CALIBRATION, CAVEAT, FULL_PRECISION, comparable, figures
from cbq.report.render import latex, markdown
from cbq.report.sweep import sweep_table

PAPER = Path(__file__).resolve().parents[3] / "shared" / "paper" / "cbq_paper.md"


@pytest.fixture
def run(result):
    """Makes results of `llama7b` by the paper's protocol, but for what is given."""

    def make(experiment: str, segment_tokens: int = 2048, model: str = "llama7b", **calibration: object) -> dict:
        made = result(9.5, model=model, experiment=experiment)
        made["perplexity"] = {"c4": made["perplexity"]["embedded"]}
        made["protocol"] = {"c4": {"segment_tokens": segment_tokens}, "calibration": CALIBRATION | calibration}
        return made

    return make


def test_every_experiment_is_in_the_papers_order():
    named = {path.stem for path in (Path(conf_dir()) / "experiment").glob("*.yaml")}
    assert set(figures()) - {FULL_PRECISION} == named


def test_beside_ours(run):
    table = sweep_table([run("table7_w8_o7"), run("table7_w4_o3")], ["table7_w1_o0"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown(table).splitlines()]
    assert lines[0][:3] == ["experiment", "llama7b c4", "llama7b c4, paper"]
    assert [line[0] for line in lines[3:]] == ["w1_o0", "w4_o3", "w8_o7"]  # as the paper has them
    assert [line[2] for line in lines[3:]] == ["14.57", "12.32", "11.86"]
    assert lines[3][1] == "missing"
    assert "llama7b seconds, paper" not in lines[0]
    assert CAVEAT in describe([run("table7_w8_o7")], table)
    assert "llama7b c4, paper" in latex(table)


def test_full_precision_time_and_memory_too(run):
    table = sweep_table(
        [run("table11_cbq", model="llama30b"), run("table3b_lora"), run("table2_w4a4_cbq", model="llama30b")]
    )
    assert table.paper["llama30b", "seconds"] == {("table11_cbq",): 7560}
    assert table.paper["llama7b", "GiB"] == {("table3b_lora",): 21.01}
    assert table.paper["llama30b", "c4"] == {(FULL_PRECISION,): 5.98, ("table2_w4a4_cbq",): 9.73}


@pytest.mark.parametrize("other", [{"segment_tokens": 512}, {"num_segments": 64}, {"name": "text"}, {"model": "pico"}])
def test_not_of_another_protocol_or_model(run, other):
    table = sweep_table([run("table7_w8_o7", **other)])
    assert table.paper == {}
    assert "paper" not in markdown(table)
    assert CAVEAT not in describe([run("table7_w8_o7")], table)


def test_not_where_options_tell_rows_apart(run):
    runs = [run("table7_w8_o7"), run("table7_w8_o7")]
    runs[1]["settings"]["quant.group_size"] = 64
    assert sweep_table(runs).paper == {}


def test_one_run_of_another_protocol_spoils_its_column(run):
    runs = [run("table7_w8_o7"), run("table7_w4_o3", num_segments=8)]
    assert comparable(runs[:1], ("llama7b", "c4"))
    assert not comparable(runs, ("llama7b", "c4"))


@pytest.mark.skipif(not PAPER.is_file(), reason="no copy of the paper here")
def test_every_perplexity_is_printed_in_the_paper():
    printed = {float(number.replace("e", "e+")) for number in re.findall(r"\d+\.\d+(?:e\d)?", PAPER.read_text())}
    ours = [
        number
        for models in figures().values()
        for row in models.values()
        for key, number in row.items()
        if key in ("c4", "wikitext2")
    ]
    assert len(ours) > 200
    assert set(ours) <= printed
