"""A finished run, run again by `cbq reproduce`."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from started_runs import one_line

pytestmark = pytest.mark.slow


def test_a_run_is_reproduced_and_a_changed_one_is_not(starter, reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    ended = starter.say("reproduce", str(run), f"out={tmp_path / 'again'}")
    assert ended.code == 0, ended.said
    assert "are the same to the bit" in ended.said
    results = json.loads((run / "results.json").read_text())
    results["perplexity"]["text"]["quantized"] += 1e-9
    results["environment"]["torch"] = "1.0"
    (run / "results.json").write_text(json.dumps(results))
    weights = run / "checkpoint" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, weights, {"format": "pt"})
    ended = starter.say("reproduce", str(run), f"out={tmp_path / 'again'}")
    assert ended.code == 2, ended.said
    assert "torch was 1.0, is" in ended.said
    for figure in ("perplexity.text.quantized: ", "checkpoint/model.safetensors: "):
        assert figure in ended.said
    assert "not reproduced: 2 of" in one_line(ended)
