"""cbq analyze from the command line, and its suggestion in a run."""

import json
import shlex
import sys
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import get_object

from cbq.analyzer import Analyzer
from cbq.cli import conf_dir, main


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_llama_folder, tiny_text_file) -> list[str]:
    """The options of a small model and a short text."""
    text = tmp_path_factory.mktemp("text") / "short.txt"
    text.write_text(tiny_text_file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return [
        *("model=hf", f"model.path={tiny_llama_folder}", "calibration=text", f"calibration.path={tiny_text_file}"),
        *(
            "calibration.num_segments=2",
            "calibration.segment_tokens=32",
            f"evaluation.text_path={text}",
            "evaluation.segment_tokens=64",
        ),
    ]


@pytest.fixture(scope="module")
def analysis(command, data, tmp_path_factory) -> Path:
    """The folder of an analysis."""
    folder = tmp_path_factory.mktemp("analysis")
    small = [
        "figure.rows=2",
        "figure.columns=2",
        "figure.points=3",
        "scan.bits=[2,4]",
        "quant=w3a16",
        "quant.symmetric=true",
    ]
    assert command("analyze", *data, *small, f"hydra.run.dir={folder}") == 0
    return folder


def test_what_is_written(analysis):
    names = {path.name for path in analysis.iterdir()}
    assert names == {"analysis.json", "figure1.png", "figure1.svg", "sensitivity.png", "sensitivity.svg"}
    assert all(path.stat().st_size > 1000 for path in analysis.iterdir())
    found = json.loads((analysis / "analysis.json").read_text())
    assert list(found["figure"]["by_bits"]) == ["4", "2"]
    for figures in found["figure"]["by_bits"].values():
        assert [len(figures[part]["hessian"]) for part in ("weights", "scales")] == [4, 4]
        assert len(figures["surface"]["loss"]) == 3
    assert len(found["sensitivity"]["linears"]) == 4 * 7
    assert found["check"]["suggested"]["effective_bits"] <= found["check"]["uniform"]["effective_bits"]
    assert found["suggestion"]["effective_bits"] == found["check"]["suggested"]["effective_bits"]
    assert found["settings"]["quant.symmetric"] is True
    assert len(set(found["suggestion"]["weight_bits"].values())) > 1


def test_the_suggestion_runs_as_it_is_printed(command, data, analysis, tmp_path):
    """Round-to-nearest of the same text by the main program: the same bits, and the same perplexity."""
    found = json.loads((analysis / "analysis.json").read_text())
    program, *words = shlex.split(found["suggestion"]["command"])
    assert program == "cbq"
    more = ["method=rtn", "tracking.mode=disabled", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command(*words, *[word for word in data if not word.startswith("model")], *more) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["effective_bits"] == found["check"]["suggested"]["effective_bits"]
    expected = found["check"]["suggested"]["perplexity"]["text"]
    assert results["perplexity"]["text"]["rtn"] == pytest.approx(expected, rel=1e-6)
    assert results["perplexity"]["text"]["quantized"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["figure=null", "scan=null"], "nothing to analyze: figure and scan are both null"),
        (["scan.budget=2"], "scan.budget must be at least 2."),
        (["figure.linear=blocks.0.mlp.up"], "is the name of no linear"),
        (["figure.row=2"], "did you mean figure.rows?"),
        (["figur=null"], "figur"),
        (["figure.points=1000000000000"], "figure.points must be at most 100"),
        (["quant=w2a16_star"], "cbq analyze suggests quant.overrides: leave them out"),
        (["quant.weight_bits=16"], "quant.weight_bits must be below 16"),
        (["quant.qkv_bits=4"], "quant.qkv_bits must be 16"),
        (["calibration.segment_tokens=1"], "calibration.segment_tokens must be at least 2"),
        (["seed=-1"], "seed must be"),
        (["scan=2.5"], "scan must be null (without it), or have options of its own, got 2.5"),
        (["scan=embedded"], "scan must be null (without it), or have options of its own, got 'embedded'"),
        (["figure=true"], "figure must be null (without it), or have options of its own, got True"),
        (["figure=[1]"], "Error merging override figure=[1]"),
        (["figure._target_=cbq.nothing"], "figure._target_ cannot be used"),
        (["scan._target_=torch.nn.Identity"], "scan must be null (without it), or have options of its own"),
        (["+scan.bit=3"], "unknown option 'scan.bit': it must be one of bits, budget"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_leaves_nothing(command, data, words, said, tmp_path, capsys):
    folder = tmp_path / "out"
    assert command("analyze", *data, *words, f"hydra.run.dir={folder}") == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    assert not folder.exists()


def test_a_refused_analysis_leaves_no_dated_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbq", "analyze", *data, "scan=3"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_too_large_for_the_device_is_one_line(command, data, tmp_path, capsys, monkeypatch):
    """Second derivatives need the whole of it there: it would be no memory, after minutes."""
    plain = Analyzer.__init__

    def on_a_gpu(self, **options):
        plain(self, **options)
        self.device = torch.device("cuda")

    monkeypatch.setattr(Analyzer, "__init__", on_a_gpu)
    monkeypatch.setattr("cbq.placement.free_device_bytes", lambda device: 2**20)
    assert command("analyze", *data, f"hydra.run.dir={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert "GiB that are free on the device" in error
    assert error.count("\n") == 1


def test_the_command_binds_to_its_classes_with_no_argument():
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        config = hydra.compose("analyze")
    for node in (config.analyzer, config.figure, config.scan):
        assert callable(get_object(node._target_))
    assert config.model.name == "pico"
    assert config.calibration._target_.endswith("embedded")
