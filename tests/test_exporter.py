"""Exports: proved, whole, or not there."""

import json
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

from cbq.errors import InputError
from cbq.export.card import card
from cbq.export.compressed_tensors import CompressedTensors
from cbq.export.gptq import AutoRound
from cbq.export.size import Size
from cbq.export.targets import AutoRound as AutoRoundTarget
from cbq.export.targets import Transformers
from cbq.exporter import Disagreement, Export, NoExport, engine_device
from cbq.models.loading import load_pretrained
from cbq.placement import model_bytes
from cbq.quant.linear import fuse_linears_
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quantized_modules
from cbq.quantized import make_quantizable_
from cbq.results import SCHEMA_PATH

RESULTS = {
    "model": "llama2_7b",
    "settings": {"model.path": "meta-llama/Llama-2-7b-hf"},
    "fingerprint": {"model": "5f2c", "revision": "01c7f73d"},
    "scheme": "W4A16",
    "method": "rtn",
    "protocol": {"calibration": {"name": "c4", "num_segments": 128, "segment_tokens": 2048}},
    "perplexity": {"wikitext2": {"full_precision": 5.0, "rtn": None, "quantized": 5.5}},
}


@pytest.fixture
def loaded(tiny_llama_folder):
    """A tiny LLaMA, rounded to nearest and fused: W4A16 for transformers."""
    return rounded(tiny_llama_folder, Transformers().constrain(QuantScheme(4, 16)))


def rounded(folder: Path, scheme: QuantScheme):
    loaded = load_pretrained(str(folder))
    make_quantizable_(loaded.model, loaded.blocks, scheme)
    for module in quantized_modules(loaded.blocks):
        module.state = QuantState.LEARNED
    fuse_linears_(loaded.blocks)
    loaded.model.requires_grad_(False)
    return loaded


def test_an_export_is_proved_and_described(loaded, tmp_path, capsys):
    found = Export(CompressedTensors(), verify_segments=2).publish(loaded, tmp_path / "export", RESULTS)
    assert found["verified"]["max_difference"] == 0
    assert found["verified"]["perplexity"] == found["verified"]["other_perplexity"]
    assert found["bytes"] / found["bf16_bytes"] < 0.30
    assert "differ from those of cbq by 0 at most" in capsys.readouterr().out
    card = (tmp_path / "export" / "README.md").read_text()
    said = (
        "llama2_7b W4A16",
        "rtn",
        "128 segments of 2048 tokens of c4",
        "| wikitext2 | 5 | - | 5.5 |",
        "from_pretrained",
    )
    for words in said:
        assert words in card
    assert "- Base model: llama2_7b, meta-llama/Llama-2-7b-hf, commit 01c7f73d\n" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "nothing else is left"
    json.dumps(found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.path": "/home/secret/models/llama-2-7b/"}, "mine, llama-2-7b"),
        ({"model.path": "~/secret/mine"}, "mine"),
        ({"model.path": "secret/llama-2-7b"}, "mine, llama-2-7b"),
        ({}, "mine"),
    ],
    ids=["absolute", "home", "relative", "embedded"],
)
def test_a_card_names_no_folder_of_the_users_machine(settings, said):
    """What has no commit of the hub was loaded from a folder."""
    results = RESULTS | {"model": "mine", "settings": settings, "fingerprint": {"model": "5f2c", "revision": None}}
    text = card(results, {"a": QuantScheme(4, 16)}, Size(1, 2, 3), [], "", [])
    assert f"- Base model: {said}\n" in text
    assert "secret" not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_a_disagreement_keeps_nothing(loaded, tmp_path, monkeypatch):
    write = CompressedTensors.write

    def spoilt(self, model, tokenizer, folder):
        write(self, model, tokenizer, folder)
        next(module for module in model.modules() if isinstance(module, torch.nn.Embedding)).weight.mul_(1.001)

    monkeypatch.setattr(CompressedTensors, "write", spoilt)
    with pytest.raises(Disagreement, match="it is not kept"):
        Export(CompressedTensors(), verify_segments=2).publish(loaded, tmp_path / "export", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bits_are_demanded_of_one_kind_of_device(loaded, tiny_llama_folder, tmp_path, monkeypatch, device, capsys):
    """A model whose blocks are kept on the host computes on a GPU, where sums come out in another order; the engine
    does on the host. Here the engine is a little off instead."""
    load_engine = CompressedTensors.load_engine

    def almost(self, folder, schemes, where):
        engine = load_engine(self, folder, schemes, torch.device("cpu"))
        engine.get_input_embeddings().weight.data.mul_(1 + 1e-6)
        return engine

    monkeypatch.setattr(CompressedTensors, "load_engine", almost)
    monkeypatch.setattr("cbq.exporter.engine_device", lambda model: torch.device(device), raising=False)
    export = Export(CompressedTensors(), verify_segments=2)
    export.remember(loaded.model, lambda: load_pretrained(str(tiny_llama_folder)))
    if device == "cpu":
        with pytest.raises(Disagreement, match="it is not kept"):
            export.publish(loaded, tmp_path / "export", {})
        return
    verified = export.publish(loaded, tmp_path / "export", {})["verified"]
    assert 0 < verified["max_difference"] < 1e-3
    assert verified["other_distance"] == pytest.approx(verified["distance"], rel=1e-3), "told apart all the same"


@pytest.mark.parametrize(("share_of_free", "expected"), [(0.5, "meta"), (0.7, "cpu")])
def test_the_engine_is_beside_the_model_where_there_is_room(loaded, monkeypatch, share_of_free, expected):
    """Free is what the model, which is there already, leaves."""
    assert engine_device(loaded.model) == torch.device("cpu")
    size = model_bytes(loaded.model)
    monkeypatch.setattr("cbq.placement.free_device_bytes", lambda device: size / share_of_free)
    assert engine_device(loaded.model.to("meta")) == torch.device(expected)


def test_full_precision_in_the_place_of_the_export_is_found(tiny_llama_folder, tmp_path, monkeypatch):
    """Its weights are packed out of sight, and 8 bits are so close that no perplexity tells."""
    loaded = rounded(tiny_llama_folder, AutoRoundTarget().constrain(QuantScheme(8, 16)))
    full_precision = load_pretrained(str(tiny_llama_folder))

    def load_full_precision(self, folder, schemes, device):
        engine = load_pretrained(str(tiny_llama_folder)).model
        for name in schemes:
            engine.set_submodule(name, torch.nn.Sequential(engine.get_submodule(name)))
        return engine

    monkeypatch.setattr("cbq.export.gptq.find_spec", lambda name: name)
    monkeypatch.setattr(AutoRound, "load_engine", load_full_precision)
    export = Export(AutoRound(), verify_segments=2)
    export.remember(loaded.model, lambda: full_precision)
    with pytest.raises(Disagreement, match=r"computes what full precision does, .* is 0 away through auto-round"):
        export.publish(loaded, tmp_path / "export", {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(loaded, tmp_path):
    (tmp_path / "mine").mkdir()
    export = Export(CompressedTensors(), out=str(tmp_path / "mine"))
    with pytest.raises(InputError, match="is there already"):
        export.check(loaded.model)
    with pytest.raises(InputError, match="is there already"):
        export.publish(loaded, tmp_path / "export", {})
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_folder_that_cannot_be_written(loaded, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        Export(CompressedTensors(), out=str(tmp_path / "file" / "x")).publish(loaded, tmp_path, {})


def test_an_engine_that_is_missing_is_said(tiny_llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cbq.export.gptq.find_spec", lambda name: None)
    loaded = rounded(tiny_llama_folder, AutoRoundTarget().constrain(QuantScheme(4, 16)))
    found = Export(AutoRound()).publish(loaded, tmp_path / "export", {})
    assert found["verified"] is None
    assert "not verified, auto-round is not installed" in capsys.readouterr().out
    assert "Not verified" in (tmp_path / "export" / "README.md").read_text()


def test_no_export(loaded, tmp_path):
    NoExport().check(loaded.model)
    assert NoExport().publish(loaded, tmp_path / "export", {}) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"verify": "no"}, "export.verify"),
        ({"verify_segments": 0}, "verify_segments"),
        ({"format": 1.5}, "export.format"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(InputError, match=said):
        Export(**{"format": CompressedTensors()} | options)


def test_the_schema_knows_an_export(loaded, tmp_path):
    schema = json.loads(SCHEMA_PATH.read_text())
    found = Export(CompressedTensors(), verify_segments=1).publish(loaded, tmp_path / "export", {})
    part = schema["properties"]["export"] | {"$defs": schema["$defs"]}
    jsonschema.validate(found, part)
    jsonschema.validate(found | {"verified": None}, part)
    assert set(part["properties"]) == set(found)
