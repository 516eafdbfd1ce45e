"""Experts with a linear a matrix: the same function, none without tokens, and the way back to transformers' files."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from tiny_models import TINY, tiny_model, token_ids
from transformers import AutoTokenizer

from cbq.checkpoint import save_checkpoint
from cbq.models.experts import Experts, counted_tokens, every_token
from cbq.models.families import find_family, get_blocks
from cbq.models.linears import to_linears_
from cbq.preprocess.statistics import expert_tokens, input_statistics
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_

MIXTURES = ("mixtral", "qwen3_moe")


@pytest.fixture(scope="module", params=MIXTURES)
def pair(request):
    """A model as transformers has it, and with linears."""
    model = tiny_model(request.param)
    ours = copy.deepcopy(model)
    to_linears_(ours)
    return model, ours


def test_every_mixture_of_the_table_is_tested():
    mixtures = {name for name in TINY if find_family(tiny_model(name).config).experts}
    assert mixtures == set(MIXTURES)


def test_the_same_function_also_where_each_sees_all_tokens(pair):
    model, ours = pair
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
        with every_token(get_blocks(ours)):
            torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not any(module.every_token for module in ours.modules() if isinstance(module, Experts))


def test_no_weight_is_copied(pair):
    model = tiny_model(model_type(pair[0]))
    pointers = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    to_linears_(model)
    assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} == pointers


def test_tokens_are_counted_as_the_router_sends_them(pair):
    model, ours = pair
    ids, sent = token_ids(), []
    hooks = [
        module.register_forward_hook(lambda module, args, output: sent.append(output[2]))
        for module in get_blocks(model).modules()
        if type(module).__name__.endswith("TopKRouter")
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    counts = expert_tokens(ours, get_blocks(ours), ids)
    assert len(counts) == len(sent)
    for index, (name, found) in zip(sent, counts.items(), strict=True):
        assert name.startswith("blocks.")
        assert found == [int((index == expert).sum()) for expert in range(len(found))]
    with counted_tokens(get_blocks(ours)) as nothing:
        pass
    assert nothing == {}


def test_statistics_of_an_expert_that_no_token_is_sent_to(pair):
    """The router's choice is replaced by the second and the third expert."""
    model = tiny_model(model_type(pair[0]))
    make_quantizable_(model, get_blocks(model), QuantScheme(4, 4))
    chosen = torch.tensor([1, 2])
    for module in get_blocks(model).modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda module, args, output: (*output[:2], chosen.expand_as(output[2])))
    ids = token_ids()
    counts = expert_tokens(model, get_blocks(model), ids)
    assert all(0 in found for found in counts.values())
    for statistics in input_statistics(model, get_blocks(model), ids):
        assert all(found.maxima.isfinite().all() for found in statistics.values())


def test_files_have_the_names_of_the_published_checkpoints(pair, tmp_path, tiny_llama_folder):
    model = tiny_model(model_type(pair[0]))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    model.save_pretrained(tmp_path / "plain")
    import cbq

    quantized, _ = cbq.quantize(model, token_ids(), "w4a16", epochs=1, progress=False)
    save_checkpoint(quantized, tokenizer, tmp_path / "ours")
    names = [
        {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        for file in (safe_open(tmp_path / part / "model.safetensors", "pt") for part in ("plain", "ours"))
    ]
    assert names[0] == names[1]
    assert any("experts.0." in name for name in names[1])
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == model.config.model_type


def model_type(model) -> str:
    """Return a model's type, which is its name in the table of small ones."""
    return model.config.model_type
