"""An export that is not what the model is gets no name."""

import pytest
import torch

from cbq.checkpoint import load_any
from cbq.errors import InputError
from cbq.export.compressed_tensors import CompressedTensors
from cbq.export.targets import VLLM, Transformers
from cbq.exporter import Disagreement, Export
from cbq.models.loading import load_pretrained
from cbq.quant.scheme import QuantScheme


def test_wrong_integers_are_found_where_logits_cannot_tell(finished, tmp_path, monkeypatch):
    """In bfloat16 nothing agrees to the bit, and 8 bits are so close that no perplexity tells."""
    loaded = finished(QuantScheme(8, 8), Transformers())
    loaded.model.to(torch.bfloat16)
    original = CompressedTensors.tensors

    def spoiled(self, linear):
        tensors = original(self, linear)
        tensors["weight"][0, 0] += 1 if tensors["weight"][0, 0] < 0 else -1
        return tensors

    monkeypatch.setattr(CompressedTensors, "tensors", spoiled)
    with pytest.raises(Disagreement, match="the weights that transformers reads for"):
        Export(CompressedTensors(), verify_segments=1).publish(loaded, tmp_path / "export", {})
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_cannot_load_it_is_no_mistake_of_the_user(finished, tmp_path, monkeypatch):
    loaded = finished(QuantScheme(4, 16, symmetric=True), Transformers())
    monkeypatch.setattr(CompressedTensors, "load_engine", lambda *_: (_ for _ in ()).throw(OSError("no file named")))
    with pytest.raises(Disagreement, match="transformers does not load the export, so it is not kept: no file named"):
        Export(CompressedTensors(), out=str(tmp_path / "a" / "b")).publish(loaded, tmp_path / "export", {})
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_no_file_system_takes(finished, tmp_path):
    loaded = finished(QuantScheme(4, 16, symmetric=True), Transformers())
    with pytest.raises(InputError, match="cannot be written: File name too long"):
        Export(CompressedTensors(), out=str(tmp_path / ("x" * 300))).check(loaded.model)


def test_an_export_is_measured_as_it_was_proved(finished, tmp_path):
    """Weights with zero points, which transformers reads only while it unpacks them."""
    loaded = finished(QuantScheme(4, 16))
    Export(CompressedTensors(), verify_segments=1).publish(loaded, tmp_path / "export", {})
    found = load_any(tmp_path / "export")
    ids = torch.arange(20)[None]
    assert torch.equal(found.model(ids).logits, loaded.model(ids).logits)


@pytest.fixture
def full_precision(tiny_llama_folder):
    """What a finished tiny LLaMA was made of."""
    return load_pretrained(str(tiny_llama_folder))


def test_an_engine_that_rounds_otherwise_is_as_far_from_full_precision(finished, full_precision, tmp_path, capsys):
    """W8A8 of vLLM in transformers, which divides by 127.5: other errors of the same size."""
    loaded = finished(QuantScheme(8, 8), VLLM())
    export = Export(CompressedTensors(), verify_segments=2)
    export.remember(loaded.model, lambda: full_precision)
    found = export.publish(loaded, tmp_path / "export", {})["verified"]
    assert found["max_difference"] > 0
    assert found["other_distance"] == pytest.approx(found["distance"], rel=0.3)
    said = f"Full precision: {found['full_precision_perplexity']:.4f}; from it a token's log likelihood is"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "export" / "README.md").read_text()


def test_full_precision_is_not_asked_for_where_logits_are_equal_to_the_bit(finished):
    def load():
        raise AssertionError("it takes minutes")

    exact = finished(QuantScheme(8, 8), Transformers()).model
    inexact = finished(QuantScheme(8, 8), VLLM()).model
    Export(CompressedTensors()).remember(exact, load)
    Export(CompressedTensors(), verify=False).remember(inexact, load)
    with pytest.raises(AssertionError):
        Export(CompressedTensors()).remember(inexact, load)
