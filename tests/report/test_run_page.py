"""The page of a run, from a run folder that was never computed."""

import json
import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from tiny_models import add_outliers_, tiny_model, token_ids

from cbq.cli import conf_dir, flatten
from cbq.cli.options import NOT_SETTINGS, check_combination, check_keys
from cbq.errors import InputError
from cbq.preprocess.cfp import CoarseToFine
from cbq.quant.linear import quant_linears
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState
from cbq.quantized import make_quantizable_
from cbq.report import charts, run_page, run_report
from cbq.report.again import reproduce
from cbq.report.observer import on_grid
from cbq.report.page import Figure, Section, write_figures
from cbq.report.run_page import write_run_page
from cbq.report.run_report import RunReport
from cbq.results import write_results

FIGURES = [
    "changed",
    "curves",
    "error",
    "memory",
    "outliers_activations",
    "outliers_weights",
    "signal_to_noise",
    "time",
]
FIGURES += ["weights", "windows"]


@pytest.fixture
def page_alone(monkeypatch) -> None:
    """Leaves out the files of the figures, which take a second."""
    monkeypatch.setattr(run_page, "write_figures", lambda folder, sections: None)


def test_page_holds_everything_and_asks_no_network(run_folder):
    page = write_run_page(run_folder).read_text(encoding="utf-8")
    assert len(page.encode()) < 3_000_000
    assert sorted(re.findall(r'class="chart" id="figure-(\w+)"', page)) == sorted(FIGURES)
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:)', markup), "nothing is fetched"
    targets = re.findall(r'href="#([^"]+)"', markup)
    identifiers = re.findall(r'id="([^"]+)"', markup)
    assert len(targets) == 9
    assert set(targets) <= set(identifiers)
    assert len(identifiers) == len(set(identifiers))
    assert "a &lt;b&gt; &amp; \N{REPLACEMENT CHARACTER}[31m" in markup
    for cell in ("16.00", "98.2%", "4.250", "1:39", "2,048 tokens of c4", "piqa acc", "0.250"):
        assert f"<td>{cell}</td>" in markup
    files = sorted(path.name for path in (run_folder / "report" / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg"))
    for name in FIGURES:
        assert ElementTree.parse(run_folder / "report" / "figures" / f"{name}.svg").getroot().tag.endswith("svg")
        assert (run_folder / "report" / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_page_of_a_run_with_results_alone(tmp_path, run_folder):
    for name in ("metrics.csv", "blocks.csv"):
        (run_folder / name).unlink()
    shutil.rmtree(run_folder / "report")
    page = write_run_page(run_folder).read_text(encoding="utf-8")
    assert re.findall(r'class="chart" id="figure-(\w+)"', page) == ["windows", "signal_to_noise", "time"]


@pytest.mark.parametrize(
    ("status", "said"),
    [("running", "This run is not finished."), ("failed", "This run failed: OSError: no &lt;b&gt; left")],
)
def test_page_of_a_run_that_did_not_finish_shows_how_far_it_came(run_folder, result, status, said, page_alone):
    """Killed while a line was written: half a line has no say."""
    write_results(run_folder, result(status=status) | {"method": "cbq", "error": "OSError: no <b> left"})
    (run_folder / "report" / "texts.json").unlink()
    lines = (run_folder / "metrics.csv").read_text().splitlines()[:9]
    lines[0] += ",window/loss_rtn,window/loss_first,window/loss_last"
    lines[8] += ",2.5,2.0,1.0"
    (run_folder / "metrics.csv").write_text("\n".join([*lines, "8,1,0.2", "9"]))
    page = write_run_page(run_folder).read_text(encoding="utf-8")
    assert said in page
    assert f"<p>{status}, seed 0, 1 window, " in page
    shown = {"curves", "windows", "error", "changed", "outliers_activations", "outliers_weights", "weights", "memory"}
    assert set(re.findall(r'class="chart" id="figure-(\w+)"', page)) == shown
    assert [row["share"] for row in rows_of(specification_of(page, "windows"))] == pytest.approx([0.8, 0.4])
    curve = specification_of(page, "curves")
    assert [line.split(",")[1] for line in rows_of(curve).splitlines()[1:]] == [str(step) for step in range(9)]


def test_no_page_of_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match=r"holds no run: there is no results\.json"):
        write_run_page(tmp_path)


def test_files_that_cannot_be_read_are_named_and_the_rest_is_shown(run_folder, page_alone):
    names = ["metrics.csv", "blocks.csv", "report/outliers.json", "report/weights/block_001.json", "report/texts.json"]
    for name in names:
        (run_folder / name).write_bytes(b"\xff{")
    page = write_run_page(run_folder).read_text(encoding="utf-8")
    assert re.findall(r"<p>(\S+) cannot be read and is left out: [^<]*</p>", page) == names
    shown = re.findall(r'class="chart" id="figure-(\w+)"', page)
    assert shown == ["windows", "signal_to_noise", "weights", "time"]


def test_names_and_texts_of_others_are_text(run_folder, page_alone):
    hostile = "</script><script>alert(1)</script>"
    results = json.loads((run_folder / "results.json").read_text())
    results |= {"model": hostile, "scheme": "${x}{{ 7 * 7 }}", "agreement": {hostile: {"block_snr_db": [1.0]}}}
    results["settings"]["model.prompt"] = hostile
    results["windows"][0]["guard"] = hostile
    write_results(run_folder, results)
    (run_folder / "report" / "texts.json").write_text(json.dumps({"texts": {hostile: hostile}}))
    page = write_run_page(run_folder).read_text(encoding="utf-8")
    assert "alert(1)</script>" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6
    assert "${x}{{ 7 * 7 }}" in page
    assert len(re.findall("<script", page)) == 2


@pytest.mark.slow
def test_page_of_eighty_blocks_of_eight_bits(run_folder, page_alone):
    """Under 3 MB, and blocks in the order of their numbers."""
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    place = {"num_channels": 4096, "coarse_threshold": 0.1234, "threshold": 0.2345, "channels": list(range(32))}
    place |= {"before": [0.1234] * 32, "after": [0.1234] * 32}
    places = [place | {"block": block, "name": name} for block in range(80) for name in names]
    (run_folder / "report" / "outliers.json").write_text(json.dumps({"activations": places, "weights": places}))
    linear = {"low": -1, "high": 256, "weights": [123456] * 257, "integers": [123456] * 256}
    for block in range(80):
        path = run_folder / "report" / "weights" / f"block_{block:03}.json"
        path.write_text(json.dumps({"block": block, "linears": dict.fromkeys(names, linear)}))
    columns = [f"{kind}/{name}" for kind in ("error", "changed") for name in names]
    lines = [",".join(["block", *columns])] + [",".join([str(n), *["0.01234"] * 14]) for n in range(80)]
    (run_folder / "blocks.csv").write_text("\n".join(lines))
    path = write_run_page(run_folder)
    assert path.stat().st_size < 3_000_000
    page = path.read_text(encoding="utf-8")
    weights = specification_of(page, "weights")
    assert [each["bind"]["options"] for each in weights["params"]] == [list(range(0, 80, 3)), names]
    assert specification_of(page, "error")["data"]["format"]["parse"] == {"block": "number", "value": "number"}


def test_heat_map_keeps_the_order_of_the_blocks(tmp_path):
    """Texts would be sorted as texts: 0, 1, 10, 11, 2."""
    blocks = pd.DataFrame({"block": range(12), "error/fc": 0.5})
    write_figures(tmp_path, [Section("a", figures=[Figure("error", "", charts.heat_map(blocks, "error", "e", "~g"))])])
    texts = [each.text for each in ElementTree.parse(tmp_path / "error.svg").iter() if each.tag.endswith("text")]
    assert [text for text in texts if text.isdigit()] == [str(block) for block in range(12)]


def specification_of(page: str, name: str) -> dict:
    """Return a figure's Vega-Lite out of a page."""
    (line,) = re.findall(r"^const specifications = (.*);$", page, flags=re.MULTILINE)
    return json.loads(line)[name]


def rows_of(specification: dict) -> list | str:
    """Return the rows, or the CSV text, of the first data of a chart."""
    return next(iter(specification["datasets"].values()))


def test_a_failure_to_draw_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    def fail(folder: Path) -> None:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr(run_report, "write_run_page", fail)
    report = RunReport()
    report.begin(tmp_path, Console())
    report.finish({"before": "a"})
    assert capsys.readouterr().out == "no report: RuntimeError: no fonts\n"


def test_a_run_that_fails_leaves_a_page(run_folder, result, page_alone):
    report = RunReport()
    report.fail()  # before it began: nothing to show, and no second error
    report.begin(run_folder, Console(quiet=True))
    write_results(run_folder, result(status="failed") | {"method": "cbq", "error": "OSError: no room"})
    report.fail()
    assert "This run failed: OSError: no room" in (run_folder / "report.html").read_text(encoding="utf-8")


def test_outliers_before_and_after_against_a_plain_look_at_the_model(tmp_path):
    """Maxima of a hooked forward, before and after; the planted outlier lies above the threshold, and comes down."""
    model = tiny_model("llama")
    add_outliers_(model, 50.0)
    make_quantizable_(model, model.model.layers, QuantScheme(4, 16))
    tokens = token_ids(num_segments=4)
    seen: list[torch.Tensor] = []
    norm = model.model.layers[1].input_layernorm
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output.abs().amax((0, 1))))
    report = RunReport()
    report.begin(tmp_path, Console(quiet=True))
    model(tokens)
    with report.preprocessing(model, model.model.layers, tokens, CoarseToFine(weights=True, activations=True)):
        CoarseToFine(weights=True, activations=True).apply_(model, model.model.layers, tokens)
    seen[1:] = []
    model(tokens)
    hook.remove()
    found = json.loads((tmp_path / "report" / "outliers.json").read_text())
    assert [each["block"] for each in found["activations"]] == [block for block in range(4) for _ in range(4)]
    (place,) = [x for x in found["activations"] if (x["block"], x["name"]) == (1, "input_layernorm")]
    assert place["channels"] == list(range(64))
    assert place["before"] == pytest.approx(seen[0].tolist(), rel=1e-3)
    assert place["after"] == pytest.approx(seen[1].tolist(), rel=1e-3)
    assert place["before"][3] > place["threshold"] > place["coarse_threshold"] / 10
    assert place["after"][3] < 0.5 * place["before"][3]
    linear = model.model.layers[2].mlp.up_proj
    (rows,) = [x for x in found["weights"] if (x["block"], x["name"]) == (2, "mlp.up_proj")]
    assert max(rows["after"]) <= linear.weight.abs().max() * 1.001


def test_weights_on_the_grid_by_hand():
    model = tiny_model("llama")
    make_quantizable_(model, model.model.layers, QuantScheme(2, 16))
    linear = quant_linears(model.model.layers[0])[0]
    linear.state = QuantState.LEARNED
    found = on_grid(linear)
    assert (found["low"], found["high"], len(found["weights"])) == (-1, 4, 20)
    assert sum(found["weights"]) == sum(found["integers"]) == linear.weight.numel()
    positions = [
        w / s + z
        for row, s, z in zip(
            linear.weight.tolist(),
            linear.weight_quantizer.scale.flatten().tolist(),
            linear.weight_quantizer.zero_point.flatten().tolist(),
            strict=True,
        )
        for w in row
    ]
    expected = np.histogram(np.clip(positions, -1, 4), bins=20, range=(-1, 4))[0]
    assert found["weights"] == pytest.approx(expected.tolist(), abs=2)
    assert min(found["weights"][5:15]) > 0, "nothing was counted where most is"
    assert found["integers"] == [int((linear.integers() == integer).sum()) for integer in range(4)]


ANY_VALUES = [
    *("model=pico", "quant=w4a4", "preprocess=cfp", "rounding=lora_ste", "calibration.num_segments=7", "seed=3"),
    *("cbd.window=4", "cbd.overlap=2", "evaluation.tasks=[piqa,ethics]", "evaluation.cache_dir='a b'"),
    *('quant.overrides=[{linears: ".*down_proj", weight_bits: 8}]', "reconstruction.epochs=2"),
]
METHODS = sorted(path.stem for path in (Path(conf_dir()) / "method").glob("*.yaml"))


@pytest.mark.parametrize(
    "words",
    [
        *(
            ANY_VALUES,
            [],
            ["reconstruction=none"],
            ["experiment=table3a_cfp"],
            ["experiment=table2_w2a16_gptq", "seed=1"],
        ),
        *([f"method={name}", "debug=fast"] for name in METHODS),
    ],
    ids=lambda words: "-".join(words[:1]),
)
def test_the_printed_command_composes_the_same_configuration(words):
    """And is one that the program takes: it refuses a group that nothing reads."""
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("config", overrides=words, return_hydra_config=True)
        choices = {key: value for key, value in config.hydra.runtime.choices.items() if "/" not in key and value}
        config = compose("config", overrides=words)
        settings = {key: value for key, value in (flatten(config) | choices).items() if key not in NOT_SETTINGS}
        environment = {"git_commit": "abc-dirty", "cbq": "0.1"}
        results = {"settings": settings, "environment": environment, "seed": config.seed, "overrides": words}
        first, command = reproduce(results).replace("\\\n", " ").splitlines()
        assert first == "git checkout abc  # and the changes that were not committed"
        typed = shlex.split(command)
        assert typed[:2] == ["python", "run.py"]
        again = compose("config", overrides=typed[2:])
    check_keys(again)
    check_combination(again, typed[2:])
    assert OmegaConf.to_container(again, resolve=False) == OmegaConf.to_container(config, resolve=False)


def test_a_run_that_does_not_say_what_was_typed_has_no_command():
    lines = reproduce({"settings": {}, "environment": {"git_commit": None, "cbq": "0.1"}}).splitlines()
    assert lines[0] == "pip install cbq==0.1"
    assert all(line.startswith("#") for line in lines[1:])
