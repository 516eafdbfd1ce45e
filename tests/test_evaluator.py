"""cbq evaluate: a checkpoint, a model, or one against the other."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from transformers import AutoModelForCausalLM, Gemma3Config, GPTBigCodeConfig

import cbq
from cbq.checkpoint import load_any
from cbq.errors import InputError
from cbq.evaluation.evaluation import Evaluation
from cbq.evaluator import Evaluator
from cbq.models.families import get_blocks
from cbq.models.loading import load_pretrained
from cbq.models.offload import offload_


@pytest.fixture(scope="module")
def text(tmp_path_factory, tiny_text_file) -> str:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(tiny_text_file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_llama_folder) -> Path:
    """A run's folder with a quantized tiny LLaMA."""
    folder = tmp_path_factory.mktemp("run")
    loaded = load_pretrained(str(tiny_llama_folder))
    tokens = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    cbq.quantize(loaded.model, tokens, scheme="w3a8", epochs=1, progress=False)
    cbq.save(loaded.model, loaded.tokenizer, folder / "checkpoint")
    return folder


def evaluate(folder: Path, text: str, model: Path | None = None, checkpoint: Path | None = None, **options) -> dict:
    evaluation = Evaluation([], 64, text_path=text, **options)
    load = None if model is None else lambda: load_pretrained(str(model))
    Evaluator(load, checkpoint and str(checkpoint), evaluation, folder, settings={"a": 1}).run()
    return json.loads((folder / "evaluation.json").read_text())


def test_one_against_the_other(tmp_path, text, tiny_llama_folder, run_folder):
    both = evaluate(tmp_path / "both", text, tiny_llama_folder, run_folder)
    assert both["perplexity"]["text"]["rtn"] is None
    assert both["agreement"]["text"]["kl_divergence"] > 0
    assert len(both["agreement"]["text"]["block_snr_db"]) == 4
    alone = evaluate(tmp_path / "alone", text, checkpoint=run_folder / "checkpoint")
    assert alone["perplexity"]["text"]["quantized"] == both["perplexity"]["text"]["quantized"]
    assert alone["perplexity"]["text"]["full_precision"] is None
    assert alone["agreement"] == {}
    model = evaluate(tmp_path / "model", text, tiny_llama_folder)
    assert model["perplexity"]["text"]["full_precision"] == both["perplexity"]["text"]["full_precision"]
    assert model["model"] == tiny_llama_folder.name
    assert model["settings"] == {"a": 1}
    assert model["protocol"]["text"]["segment_tokens"] == 64


def test_one_model_is_gone_before_the_other_comes(tmp_path, text, tiny_llama_folder, run_folder, monkeypatch):
    """Blocks in host memory and what keeps them hold each other: no count of references lets them go."""
    seen = []

    def offload(model, device, wanted):
        offload_(model, get_blocks(model), torch.device("cpu"))
        seen.append(weakref.ref(get_blocks(model)[0].mlp.down_proj.weight))

    def load(folder):
        assert [each() for each in seen] == [None]
        return load_any(folder)

    monkeypatch.setattr("cbq.evaluator.place_", offload)
    monkeypatch.setattr("cbq.evaluator.load_any", load)
    gc.disable()  # not by chance
    try:
        evaluate(tmp_path, text, tiny_llama_folder, run_folder)
    finally:
        gc.enable()
    assert len(seen) == 2


def test_the_checkpoint_computes_with_its_activation_quantization(tmp_path, text, run_folder):
    """Plain transformers would load the same folder without it."""
    ours = evaluate(tmp_path / "ours", text, checkpoint=run_folder)["perplexity"]["text"]["quantized"]
    plain = AutoModelForCausalLM.from_pretrained(run_folder / "checkpoint")
    loaded = load_pretrained(str(run_folder / "checkpoint"))
    evaluation = Evaluation([], 64, text_path=text)
    evaluation.prepare(loaded)
    loaded.model = plain.eval()
    assert evaluation.score_texts(loaded).texts["text"].perplexity != ours


def test_a_folder_of_another_architecture(tmp_path, text, tiny_llama_folder):
    config = GPTBigCodeConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / file, tmp_path / "other" / file)
    found = evaluate(tmp_path / "out", text, checkpoint=tmp_path / "other")
    assert 100 < found["perplexity"]["text"]["quantized"] < 1000


def test_a_folder_of_a_model_of_texts_and_images(tmp_path, text, tiny_llama_folder):
    """Whose configuration has that of its texts inside."""
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=TINY["gemma3_text"][1], vision_config=images, mm_tokens_per_image=4, image_token_index=319
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / file, tmp_path / "other" / file)
    loaded = load_any(tmp_path / "other")
    assert loaded.context == 64
    found = evaluate(tmp_path / "out", text, checkpoint=tmp_path / "other")
    assert 100 < found["perplexity"]["text"]["quantized"] < 1000


def test_another_models_checkpoint_is_not_compared(tmp_path, text, tiny_llama_folder, run_folder):
    other = load_pretrained(str(tiny_llama_folder))
    other.model.lm_head.weight.data.mul_(2)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"not of this model.*evaluation\.agreement_tokens=0 measures the rest"):
        evaluate(tmp_path / "out", text, tmp_path / "other", run_folder)
    assert not (tmp_path / "out").exists()
    assert evaluate(tmp_path / "out", text, tmp_path / "other", run_folder, agreement_tokens=0)["agreement"] == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a folder: give a run's"), ({}, "the tokenizer in .* cannot be read"), ({"a": 1}, "tokenizer")],
)
def test_bad_folders(tmp_path, text, content, message):
    folder = tmp_path / "checkpoint"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        evaluate(tmp_path / "out", text, checkpoint=folder)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_there(tmp_path, text, tiny_llama_folder):
    shutil.copytree(tiny_llama_folder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="transformers cannot load the model in"):
        evaluate(tmp_path / "out", text, checkpoint=tmp_path / "broken")


def test_a_part_of_the_weights_is_not_made_up(tmp_path, text, tiny_llama_folder):
    """transformers would fill in random numbers, and say so in a log."""
    shutil.copytree(tiny_llama_folder, tmp_path / "broken")
    state = load_file(tmp_path / "broken" / "model.safetensors")
    del state["model.layers.1.mlp.down_proj.weight"]
    save_file(state, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lacks parameters: model\.layers\.1\.mlp\.down_proj\.weight"):
        evaluate(tmp_path / "out", text, checkpoint=tmp_path / "broken")


def test_a_tokenizer_of_another_model(tmp_path, text, tiny_llama_folder):
    config = GPTBigCodeConfig(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / file, tmp_path / "other" / file)
    with pytest.raises(InputError, match="has ids up to 319, but the model's vocabulary has 100 ids"):
        evaluate(tmp_path / "out", text, checkpoint=tmp_path / "other")


@pytest.mark.parametrize("checkpoint", ["/no/such/folder", "~nobody/checkpoint", "x" * 300])
def test_the_checkpoint_is_looked_for_before_hours_of_work(tmp_path, checkpoint):
    with pytest.raises(InputError, match="is not a folder: give a run's"):
        Evaluator(lambda: pytest.fail("the model was loaded"), checkpoint, Evaluation([], 64), tmp_path, {})


def test_without_scores_of_full_precision_it_is_compared_all_the_same(tmp_path, text, tiny_llama_folder, run_folder):
    found = evaluate(tmp_path / "out", text, tiny_llama_folder, run_folder, baselines=False)
    assert found["perplexity"]["text"]["full_precision"] is None
    assert found["agreement"]["text"]["kl_divergence"] > 0


def test_a_model_that_is_none(tmp_path):
    """As `cbq evaluate <folder> +model.name=x` makes it."""
    with pytest.raises(InputError, match=r"model=<name> chooses a model, got \{'name': 'x'\}"):
        Evaluator({"name": "x"}, str(tmp_path), Evaluation([], 64), tmp_path, {})


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(InputError, match="give checkpoint=<folder>, model=<name>, or both"):
        Evaluator(None, None, Evaluation([], 64), tmp_path, {})
