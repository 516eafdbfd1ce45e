"""`cbq export` of a finished checkpoint: what its proof says of the model that it was made of."""

import pytest
import torch

from cbq.checkpoint import save_checkpoint
from cbq.errors import InputError
from cbq.export.compressed_tensors import CompressedTensors
from cbq.export.targets import VLLM
from cbq.export_checkpoint import ExportCheckpoint
from cbq.exporter import Export
from cbq.models.loading import load_pretrained
from cbq.quant.linear import fuse_linears_
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quantized_modules
from cbq.quantized import make_quantizable_


@pytest.fixture(scope="module")
def checkpoint(tiny_llama_folder, tmp_path_factory):
    """A checkpoint whose logits transformers does not give to the bit: W8A8 as vLLM computes it."""
    loaded = load_pretrained(str(tiny_llama_folder))
    make_quantizable_(loaded.model, loaded.blocks, VLLM().constrain(QuantScheme(8, 8)))
    for module in quantized_modules(loaded.blocks):
        module.state = QuantState.LEARNED
    fuse_linears_(loaded.blocks)
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    save_checkpoint(loaded.model, loaded.tokenizer, folder)
    return folder


def verified(checkpoint, out, load_base) -> dict:
    export = Export(CompressedTensors(), out=str(out), verify_segments=1)
    return ExportCheckpoint(str(checkpoint), export, load_base).run()["verified"]


def test_full_precision_is_the_model_that_the_checkpoint_was_made_of(checkpoint, tiny_llama_folder, tmp_path, capsys):
    found = verified(checkpoint, tmp_path / "out", lambda: load_pretrained(str(tiny_llama_folder)))
    assert found["distance"] > 0
    assert "Full precision: " in capsys.readouterr().out


def other_model(folder):
    loaded = load_pretrained(str(folder))
    torch.nn.init.normal_(loaded.model.lm_head.weight)
    return loaded


def missing_model(folder):
    raise InputError("model path '/gone' is not a folder")


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (None, "it is not known which model"),
        (other_model, "is not the model that"),
        (missing_model, "model path '/gone' is not a folder"),
    ],
    ids=["not known", "another one", "gone"],
)
def test_where_there_is_none_that_is_said(checkpoint, tiny_llama_folder, tmp_path, capsys, load, said):
    found = verified(checkpoint, tmp_path / "out", load and (lambda: load(tiny_llama_folder)))
    assert found["distance"] is None
    output = capsys.readouterr().out
    assert "export: not compared with full precision: " in output
    assert said in output
    assert "Not compared with full precision." in (tmp_path / "out" / "README.md").read_text()
