"""A run that can be started often, and one that nothing happened to."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from started_runs import Starter


@pytest.fixture(scope="session")
def starter(tmp_path_factory, tiny_llama_folder, tiny_text_file) -> Iterator[Starter]:
    """Starts three windows of CBQ at W4A4 with coarse-to-fine preprocessing, on a model of four small blocks."""
    folder = tmp_path_factory.mktemp("starter")
    text = folder / "text.txt"
    text.write_text(tiny_text_file.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    argv = ["model=hf", f"model.path={tiny_llama_folder}", "quant=w4a4", "preprocess=cfp", "tracking.mode=disabled"]
    argv += ["calibration=text", f"calibration.path={text}", "calibration.num_segments=4"]
    argv += ["calibration.segment_tokens=32", f"evaluation.text_path={text}", "evaluation.segment_tokens=32"]
    argv += ["evaluation.agreement_tokens=64", "evaluation.cache_dir=null"]
    starter = Starter(argv, folder)
    yield starter
    starter.server.stdin.close()
    starter.server.wait()


@pytest.fixture(scope="session")
def reference(starter, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    ended = starter.start(folder)
    assert ended.code == 0, ended.said
    return folder


@pytest.fixture
def seconds(starter, reference, tmp_path) -> float:
    """How long a run takes now, from the order to the end of the work: without its page, which comes after it."""
    return starter.start(tmp_path / "timed", "report=none").seconds


@pytest.fixture
def moments() -> random.Random:
    """The same moments in every run of the tests."""
    return random.Random(0)
