"""Targets, exports and generation from the command line."""

import json
from pathlib import Path

import hydra
import jsonschema
import pytest
import torch
from hydra.utils import get_object
from transformers import AutoModelForCausalLM

from cbq.checkpoint import load_checkpoint
from cbq.cli import conf_dir
from cbq.results import SCHEMA_PATH

TOKENS = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run_folder(command, tiny_llama_folder, tiny_text_file, tmp_path_factory) -> Path:
    """A run of the tiny LLaMA, learned for a moment, and exported: W4A4 for transformers."""
    folder = tmp_path_factory.mktemp("runs") / "w4a4"
    words = [
        *("model=hf", f"model.path={tiny_llama_folder}", "quant=w4a4", "target=transformers", "rounding=dense_ste"),
        *("reconstruction.epochs=1", "tracking.mode=disabled", "report=none"),
        *("calibration=text", f"calibration.path={tiny_text_file}", "evaluation=embedded"),
        *("calibration.num_segments=2", "calibration.segment_tokens=32", "evaluation.corpora=[]"),
        *("export=compressed_tensors", "export.verify_segments=1", f"hydra.run.dir={folder}"),
    ]
    assert command(*words) == 0
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_a_run_leaves_an_export_that_transformers_loads(run_folder):
    results = json.loads((run_folder / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA_PATH.read_text()))
    assert results["export"]["verified"]["max_difference"] == 0
    assert results["settings"]["target"] == "transformers"
    assert results["settings"]["quant.engine_activations"] is True
    assert any(window["changed_integers"] > 0 for window in results["windows"])
    engine = AutoModelForCausalLM.from_pretrained(run_folder / "export", dtype="auto").eval()
    assert torch.equal(logits(engine), logits(load_checkpoint(run_folder / "checkpoint").model))


def test_the_command_writes_the_same(command, run_folder, tmp_path, capsys):
    out = tmp_path / "again"
    assert command("export", str(run_folder), f"export.out={out}", "export.verify_segments=1") == 0
    names = {path.name for path in (run_folder / "export").iterdir()}
    assert {path.name for path in out.iterdir()} == names
    for name in names - {"README.md"}:
        assert (out / name).read_bytes() == (run_folder / "export" / name).read_bytes()


def test_an_inexact_export_is_told_apart_from_the_model_of_the_run(
    command, tiny_llama_folder, tiny_text_file, tmp_path, capsys
):
    """By the run, which has it in memory, and by the command, which loads it: the same figures."""
    folder, out = tmp_path / "run", tmp_path / "again"
    words = ["model=hf", f"model.path={tiny_llama_folder}", "quant=w8a8", "target=vllm", "method=rtn"]
    words += ["tracking.mode=disabled", "report=none", "calibration.num_segments=2"]
    words += ["calibration=text", f"calibration.path={tiny_text_file}"]
    words += [
        "calibration.segment_tokens=32",
        "evaluation=embedded",
        "evaluation.corpora=[]",
        "export.verify_segments=1",
    ]
    assert command(*words, "export=compressed_tensors", f"hydra.run.dir={folder}") == 0
    assert "silently leave out the quantization of activations" in " ".join(capsys.readouterr().out.split())
    results = json.loads((folder / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA_PATH.read_text()))
    verified = results["export"]["verified"]
    assert verified["other_distance"] > verified["distance"] / 2 > 0
    assert command("export", str(folder), f"export.out={out}", "export.verify_segments=1") == 0
    said = f"Full precision: {verified['full_precision_perplexity']:.4f}; from it a token's log likelihood is"
    assert said in capsys.readouterr().out
    assert said in (out / "README.md").read_text()


def test_generate_beside_the_model_of_the_run(command, run_folder, capsys):
    prompt = "prompt=def it's(x=1, [\\"
    assert command("generate", str(run_folder / "checkpoint"), prompt, "compare=true", "max_tokens=4") == 0
    output = capsys.readouterr().out
    assert "full precision (" in output
    assert "def it's(x=1, [\\" in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export"], "checkpoint is required: give checkpoint=<value>"),
        (["export", "/no/folder"], "/no/folder is neither a checkpoint of cbq nor the folder of a finished run"),
        (["export", "RUN"], "is there already: choose another"),
        (["export", "RUN", "export.verfy=false"], "did you mean export.verify?"),
        (["export", "RUN", "export=gptq", "export.out=x"], "has weights of 2, 3, 4, 8 bits and no activations"),
        (["export", "RUN", "export=gguf"], "must be one of autoround, compressed_tensors, gptq, none"),
        (["generate", "RUN"], "prompt is required"),
        (["generate", "RUN", "prompt=x", "max_token=3"], "did you mean max_tokens?"),
        (["target=vllm", "quant=w2a16"], "target=vllm cannot run W2A16; the nearest that it can: quant.weight_bits=4"),
        (["target=tensorrt"], "must be one of autoround, none, transformers, vllm"),
        (["target=vllm", "target.scale_dtype=int8"], "target.scale_dtype must be one of"),
        (
            ["target=transformers", "quant=w4a4", "preprocess=omse", "debug=fast"],
            "preprocess.activations must be false",
        ),
        (["export=compressed_tensors", "quant=w4a4", "quant.qkv_bits=4", "debug=fast"], "queries, keys and values"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(command, run_folder, words, said, capsys):
    words = [str(run_folder) if word == "RUN" else word for word in words]
    quiet = ["tracking.mode=disabled", "report=none"] if words[0] not in ("export", "generate") else []
    assert command(*words, *quiet) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["export", "generate"])
def test_a_command_binds_to_its_class(name):
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        config = hydra.compose(name, overrides=["checkpoint=x", *(["prompt=x"] if name == "generate" else [])])
    assert callable(get_object(config.command._target_))
