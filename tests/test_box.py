"""Models whose blocks stay in host memory, on a device that is not the host: results and whole runs, to the bit.

Each is a process of its own: torch must know the device before it looks for one. The first compiles it, for a minute.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils import cpp_extension

TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (cpp_extension.is_ninja_available() and shutil.which(cpp_extension.get_cxx_compiler())),
        reason="the device is compiled",
    ),
]
SMALL = [
    "tracking.mode=disabled",
    "calibration.num_segments=4",
    "calibration.segment_tokens=64",
    "quant=w4a4",
    "deterministic=true",  # what CUDA has no deterministic kernel for is refused
    "preprocess=cfp",
    "rounding=dense_ste",
    "reconstruction.epochs=1",
    "evaluation.cache_dir=null",
    "evaluation.segment_tokens=128",
    "evaluation.agreement_tokens=256",
]


def on_the_box(module: str, *arguments: str) -> str:
    """Return what a module of `tests/box` prints."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    done = subprocess.run(
        [sys.executable, "-m", f"box.{module}", *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3_moe"])
def test_blocks_that_come_and_go_change_nothing(family):
    """CFP, AWQ, learned windows, learned scaling, GPTQ, static activations; never more than a window on the device."""
    lines = on_the_box("families", family).splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["equal"] * 4, lines


def test_a_whole_run_is_equal_and_takes_less_of_the_device(tmp_path):
    text = tmp_path / "test.txt"
    text.write_text((TESTS.parent / "src/cbq/pico/test.txt").read_text(encoding="utf-8")[:8000], encoding="utf-8")
    runs = {}
    for offload in ("true", "false"):
        folder = tmp_path / offload
        on_the_box("whole_run", str(folder), offload, *SMALL, f"evaluation.text_path={text}")
        for file in ("outliers.json", "weights/block_007.json"):
            assert (folder / "report" / file).is_file(), "a report that fails is only said"
        results = json.loads((folder / "results.json").read_text())
        losses = [[w[key] for key in ("rec_loss_first", "rec_loss_last", "rec_loss_rtn")] for w in results["windows"]]
        files = ("model.safetensors", "cbq/quantized.safetensors")
        tensors = [load_file(folder / "checkpoint" / file) for file in files]
        runs[offload] = (results["perplexity"], results["agreement"], losses), tensors
    assert runs["true"][0] == runs["false"][0]
    for ours, theirs in zip(runs["true"][1], runs["false"][1], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    blocks = sum(tensor.nbytes for name, tensor in runs["true"][1][0].items() if name.startswith("model.layers."))
    spared = peak_bytes(tmp_path / "false") - peak_bytes(tmp_path / "true")
    assert spared > 0.7 * blocks, "six of eight blocks are never there"


def peak_bytes(folder: Path) -> int:
    """Return the most bytes that a run had on the device."""
    return json.loads((folder / "box.json").read_text())["peak_bytes"]
