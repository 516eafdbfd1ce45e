"""An export that is not what the model is gets no name."""

import pytest
import torch

from cbq.checkpoint import load_any
from cbq.errors import InputError
from cbq.export.compressed_tensors import CompressedTensors
from cbq.export.targets import Transformers
from cbq.exporter import Disagreement, Export
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
