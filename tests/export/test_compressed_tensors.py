"""compressed-tensors exports, read by transformers and by the library itself."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from export.conftest import finish_
from safetensors.torch import load_file
from tiny_models import TINY, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from cbq.errors import InputError
from cbq.export.compressed_tensors import CompressedTensors, layout
from cbq.export.formats import quantized_schemes
from cbq.export.targets import VLLM, Transformers
from cbq.models.engine import load_quantized
from cbq.models.families import get_blocks
from cbq.quant.linear import fused_linears
from cbq.quant.scheme import QuantScheme

TOKENS = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")
# Every layout, symmetry and granularity, as transformers is told of them by its target.
SCHEMES = [
    QuantScheme(2, 16),
    QuantScheme(3, 16, group_size=32),
    QuantScheme(4, 16),
    QuantScheme(8, 16, group_size=16),
    QuantScheme(8, 8),
    QuantScheme(4, 8, symmetric=True, act_symmetric=True),
    QuantScheme(4, 4),
    QuantScheme(4, 4, symmetric=True, act_symmetric=True, group_size=32),
    QuantScheme(5, 6, act_granularity="tensor"),
]


def logits(model: torch.nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def write(loaded, folder: Path) -> dict:
    """Export a finished model; return what its config.json says of quantization."""
    CompressedTensors().write(loaded.model, loaded.tokenizer, folder)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.label}-{scheme.act_granularity}")
def test_plain_transformers_gives_the_same_logits_to_the_bit(finished, tmp_path, scheme):
    loaded = finished(scheme, Transformers())
    write(loaded, tmp_path)
    assert CompressedTensors().is_exact(quantized_schemes(loaded.model))
    engine = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert torch.equal(logits(engine), logits(loaded.model))
    assert not hasattr(loaded.model.config, "quantization_config"), "the model in memory is not changed"


@pytest.mark.parametrize(
    "scheme",
    [QuantScheme(4, 16, group_size=32), QuantScheme(3, 16), QuantScheme(8, 8)],
    ids=lambda scheme: scheme.label,
)
def test_the_library_unpacks_what_was_packed(finished, tmp_path, scheme):
    """Integers, scales and zero points arrive bit-exactly: the library's own decompression gives cbq's weights."""
    loaded = finished(scheme)
    config = QuantizationConfig.model_validate(write_any(loaded, tmp_path))
    (group,) = config.config_groups.values()
    tensors = load_file(tmp_path / "model.safetensors")
    for name, linear in fused_linears(loaded.model):
        parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        found = BaseCompressor.get_value_from_registry(group.format).decompress(parts, group)
        assert torch.equal(found["weight"], linear.weight)
        assert torch.equal(parts["weight_scale"], linear.weight_scale)
        half = 2 ** (scheme.weight_bits - 1)
        assert torch.equal(found["weight_zero_point"].to(torch.int16) + half, linear.zero_point.to(torch.int16))


def write_any(loaded, folder: Path) -> dict:
    """Export without a target: multipliers of activations are taken off, which no engine has."""
    for _, linear in fused_linears(loaded.model):
        if linear.act_quantizer is not None:
            torch.nn.init.ones_(linear.act_quantizer.range_multiplier)
    return write(loaded, folder)


def test_packed_zero_points_need_dequantize(finished, tmp_path):
    loaded = finished(QuantScheme(4, 16, group_size=32), VLLM())
    write(loaded, tmp_path)
    schemes = quantized_schemes(loaded.model)
    engine = CompressedTensors().load_engine(tmp_path, schemes, CPU)
    assert torch.equal(logits(engine), logits(loaded.model))
    assert any("dequantize=True" in note for note in CompressedTensors().notes(schemes))
    assert {
        linear.weight_scale.bfloat16().float().equal(linear.weight_scale) for _, linear in fused_linears(loaded.model)
    } == {True}


def test_linears_of_different_schemes_and_in_full_precision(finished, tmp_path):
    overrides = [
        {"linears": r"blocks\.(0|-1)\..*down_proj", "weight_bits": 4, "group_size": 32},
        {"linears": r"blocks\.1\.self_attn\..*", "weight_bits": 16, "act_bits": 16},
        {"linears": r"blocks\.2\.mlp\.up_proj", "act_bits": 8, "weight_bits": 8},
    ]
    loaded = finished(QuantScheme(2, 16, overrides=overrides), Transformers())
    config = write(loaded, tmp_path)
    assert len(config["config_groups"]) == 3
    assert sorted(len(group["targets"]) for group in config["config_groups"].values()) == [1, 2, 28 - 4 - 3]
    assert set(config["ignore"]) == {"lm_head", *(f"model.layers.1.self_attn.{x}_proj" for x in "qkvo")}
    assert config["format"] == "mixed-precision"
    assert torch.equal(logits(load_quantized(tmp_path, CPU)), logits(loaded.model))


@pytest.mark.parametrize("name", sorted(TINY))
def test_families(name, tmp_path, tiny_llama_folder):
    """Every family loads with the same logits, or is refused by a line: no third way."""
    model = tiny_model(name)
    finish_(model, get_blocks(model), Transformers().constrain(QuantScheme(4, 8)))
    tokens = token_ids(2, 16)
    refused = {"gpt2": "transposed", "mixtral": "mixture", "qwen3_moe": "mixture", "opt": "flattens the tokens"}
    family = name.partition("-")[0]
    if family in refused:
        with pytest.raises(InputError, match=refused[family]):
            CompressedTensors().check(model)
        return
    CompressedTensors().write(model, FakeTokenizer(), tmp_path)
    assert torch.equal(logits(load_quantized(tmp_path, CPU), tokens), logits(model, tokens))


class FakeTokenizer:
    """Nothing to save."""

    def save_pretrained(self, folder: Path) -> None:
        """Do nothing."""


def test_opt_with_weights_alone_and_with_static_activations(tmp_path):
    for number, scheme in enumerate((QuantScheme(4, 16), QuantScheme(8, 8, act_granularity="tensor"))):
        model = tiny_model("opt")
        finish_(model, get_blocks(model), Transformers().constrain(scheme))
        folder = tmp_path / str(number)
        CompressedTensors().write(model, FakeTokenizer(), folder)
        assert torch.equal(logits(load_quantized(folder, CPU), token_ids(2, 16)), logits(model, token_ids(2, 16)))


def test_tied_embeddings(tiny_llama_folder, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, tie_word_embeddings=True, **small)).eval()
    finish_(model, get_blocks(model), Transformers().constrain(QuantScheme(4, 16)))
    CompressedTensors().write(model, FakeTokenizer(), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert torch.equal(logits(load_quantized(tmp_path, CPU)), logits(model))


def test_a_multiplier_of_activations_is_refused(finished, tmp_path):
    loaded = finished(QuantScheme(8, 8))
    with pytest.raises(InputError, match=r"multiplies the range of its activations by .* target=transformers"):
        CompressedTensors().write(loaded.model, loaded.tokenizer, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    with pytest.raises(InputError, match=r"multiplies the range of its activations by 0\."):
        CompressedTensors().check(loaded.model)  # before full precision is loaded and measured


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (QuantScheme(16, 8), "full-precision weights"),
        (QuantScheme(16, 16), "no linear is quantized"),
        (QuantScheme(4, 16, qkv_bits=8), "queries, keys and values"),
    ],
    ids=["W16A8", "W16A16", "qkv"],
)
def test_what_has_no_place_is_refused(finished, scheme, said):
    with pytest.raises(InputError, match=said):
        CompressedTensors().check(finished(scheme).model)


def test_layouts():
    """Integer kernels of vLLM read unpacked integers, and transformers no packed zero points beside activations."""
    assert layout(QuantScheme(4, 16)) == "pack-quantized"
    assert layout(QuantScheme(4, 8, symmetric=True)) == "int-quantized"
    assert layout(QuantScheme(4, 8, symmetric=True, group_size=32)) == "pack-quantized"
    assert layout(QuantScheme(4, 4, symmetric=True)) == "pack-quantized"
    assert layout(QuantScheme(4, 4)) == "int-quantized"


VLLM_DROPS = "silently ignores"
DEQUANTIZE_DROPS = "drops the quantization of activations with CompressedTensorsConfig(dequantize=True)"


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (QuantScheme(4, 16, symmetric=True), set()),
        (QuantScheme(8, 8, symmetric=True), {DEQUANTIZE_DROPS}),
        (QuantScheme(4, 8, symmetric=True), {DEQUANTIZE_DROPS}),
        (QuantScheme(6, 6), {DEQUANTIZE_DROPS}),  # vLLM refuses its zero points
        (QuantScheme(4, 4, symmetric=True), {VLLM_DROPS, DEQUANTIZE_DROPS}),
        (QuantScheme(4, 8, symmetric=True, group_size=32), {VLLM_DROPS, DEQUANTIZE_DROPS}),
        (QuantScheme(2, 8, symmetric=True, act_granularity="tensor"), {VLLM_DROPS, DEQUANTIZE_DROPS}),
    ],
    ids=lambda value: value.label if isinstance(value, QuantScheme) else "",
)
def test_dropped_activations_are_said_of_every_layout(scheme, said):
    other = QuantScheme(8, 16, symmetric=True)
    for schemes in ({"a": scheme}, {"a": other, "b": scheme}):
        notes = CompressedTensors().notes(schemes)
        assert {words for words in (VLLM_DROPS, DEQUANTIZE_DROPS) if any(words in note for note in notes)} == said
