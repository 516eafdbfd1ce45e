"""A finished model on disk and back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cbq.checkpoint import QUANTIZED_FILE, load_any, load_checkpoint, save_checkpoint
from cbq.errors import InputError
from cbq.models.loading import LoadedModel, load_pretrained
from cbq.quant.linear import fuse_linears_, fused_linears, quant_linears
from cbq.quant.quantizer import act_quantizers
from cbq.quant.rounding import DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quantized_modules
from cbq.quantized import make_quantizable_

SCHEMES = [
    QuantScheme(2, 16, group_size=16),
    QuantScheme(4, 4),
    QuantScheme(8, 6, symmetric=True, act_symmetric=True, act_denominator=31),
    QuantScheme(16, 8),
    QuantScheme(4, 5, act_granularity="tensor"),
    QuantScheme(4, 16, act_symmetric=True, qkv_bits=4),
]
TOKENS = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(0))


def finish(folder: Path, scheme: QuantScheme, dtype: str = "float32") -> LoadedModel:
    """Return the model of `folder`, finished with something learned everywhere: offsets and both step sizes."""
    loaded = load_pretrained(str(folder), dtype=dtype)
    make_quantizable_(loaded.model, loaded.blocks, scheme)
    torch.manual_seed(0)
    for module in quantized_modules(loaded.blocks):
        module.state = QuantState.LEARNED
    for quantizer in act_quantizers(loaded.blocks):
        torch.nn.init.uniform_(quantizer.range_multiplier, 0.7, 1.1)
    for linear in quant_linears(loaded.blocks):
        if linear.weight_quantizer:
            linear.rounding = DenseSTE(linear.out_features, linear.in_features, learning_rate=0.1)
            torch.nn.init.normal_(linear.rounding.offset_values)
            torch.nn.init.uniform_(linear.weight_quantizer.step_size.multiplier, 0.9, 1.1)
        if linear.act_quantizer:
            for number, buffer in enumerate(linear.act_quantizer.buffers()):  # static: a scale and a zero point too
                buffer.fill_([0.9, 0.1, 15.0][number])
    fuse_linears_(loaded.blocks)
    loaded.model.requires_grad_(False)
    return loaded


def test_weights_are_in_files_of_a_limited_size(tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("cbq.checkpoint.SHARD_SIZE", "100KB")
    saved = finish(tiny_llama_folder, QuantScheme(4, 4))
    save_checkpoint(saved.model, saved.tokenizer, tmp_path)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 4
    largest = max(tensor.nbytes for tensor in saved.model.state_dict().values())
    assert all(file.stat().st_size < max(100_000, largest) + 10_000 for file in files)
    expected = logits(saved.model)
    assert torch.equal(logits(load_checkpoint(tmp_path).model), expected)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.fixture(scope="module", params=SCHEMES, ids=lambda scheme: scheme.label)
def saved(request, tiny_llama_folder, tmp_path_factory) -> tuple[LoadedModel, QuantScheme, Path]:
    """A finished model, its scheme, and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp("checkpoint")
    loaded = finish(tiny_llama_folder, request.param)
    save_checkpoint(loaded.model, loaded.tokenizer, folder)
    return loaded, request.param, folder


def test_what_engines_leave_out_is_said(tiny_llama_folder, tmp_path):
    for number, (scheme, said) in enumerate(
        [
            (QuantScheme(4, 16), 0),
            (QuantScheme(4, 16, overrides=[{"linears": ".*down_proj", "act_bits": 8}]), 1),
            (QuantScheme(4, 16, qkv_bits=4), 1),
        ]
    ):
        loaded = finish(tiny_llama_folder, scheme)
        notes = save_checkpoint(loaded.model, loaded.tokenizer, tmp_path / str(number))
        assert ["silently leave out the quantization of activations" in note for note in notes] == [True] * said


def test_load_is_bit_equal(saved, tiny_llama_folder):
    loaded, _, folder = saved
    again = load_checkpoint(folder)
    expected = logits(loaded.model)
    assert torch.equal(logits(again.model), expected)
    assert not torch.equal(logits(load_pretrained(str(tiny_llama_folder)).model), expected)
    assert again.tokenizer("def f(x):")["input_ids"] == loaded.tokenizer("def f(x):")["input_ids"]
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    assert not any(module.training for module in again.model.modules() if isinstance(module, torch.nn.Linear))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_load_is_bit_equal_in_half_precision(tiny_llama_folder, tmp_path, dtype):
    """A model that ran in a half precision comes back in it, without a GPU too."""
    scheme = QuantScheme(4, 8)
    loaded = finish(tiny_llama_folder, scheme, dtype)
    save_checkpoint(loaded.model, loaded.tokenizer, tmp_path)
    again = load_checkpoint(tmp_path)
    assert again.model.dtype == loaded.model.dtype == getattr(torch, dtype)
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_plain_transformers_loads_the_weights(saved):
    """Bit-equal where only weights are quantized; where activations are too, it lacks just those."""
    loaded, scheme, folder = saved
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), "every name and shape is the plain model's"
    assert model.dtype == torch.float32
    assert torch.equal(logits(model.eval()), logits(loaded.model)) == (
        not (scheme.quantizes_activations or scheme.quantizes_qkv)
    )
    for name, linear in fused_linears(loaded.model):
        assert torch.equal(model.get_submodule(name).weight, linear.weight)


def test_a_copy_without_the_quantization_of_activations_is_no_model_to_measure(saved, tmp_path):
    """As `cp checkpoint/*` makes: its weights alone compute something else. Weights alone that are all are one."""
    loaded, scheme, folder = saved
    copied = Path(shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("cbq")))
    in_activations = scheme.quantizes_activations or scheme.quantizes_qkv
    if in_activations:
        with pytest.raises(InputError, match=r"quantized\.safetensors is missing.* without cbq_activations in"):
            load_any(copied)
        config = json.loads((copied / "config.json").read_text())
        assert (folder / config.pop("cbq_activations")).is_file()
        (copied / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_any(copied).model), logits(loaded.model)) is not in_activations


def test_what_is_written_of_a_loaded_checkpoint_is_no_checkpoint(saved, tmp_path):
    finished, _, folder = saved
    for loaded in (finished.model, load_checkpoint(folder).model, load_pretrained(str(folder)).model):
        loaded.config.save_pretrained(tmp_path)
        assert "cbq" not in (tmp_path / "config.json").read_text()


def test_names_on_disk_are_the_plain_models(saved, tiny_llama_folder):
    folder = saved[-1]
    assert sorted(folder.glob("**/*.safetensors")) == [folder / QUANTIZED_FILE, folder / "model.safetensors"]
    plain, fused = (load_file(path / "model.safetensors") for path in (tiny_llama_folder, folder))
    assert {name: (t.shape, t.dtype) for name, t in fused.items()} == {
        name: (t.shape, t.dtype) for name, t in plain.items()
    }
    for name in plain:
        assert torch.equal(plain[name], fused[name]) == ("_proj." not in name or saved[1].weight_bits == 16)


def test_quantized_file_is_as_documented(saved):
    """By the formula of its documentation the tensors give the weights, one number at a time."""
    _, scheme, folder = saved
    weights = load_file(folder / "model.safetensors")
    with safe_open(folder / QUANTIZED_FILE, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    linears = json.loads(metadata["linears"])
    assert len(linears) == 4 * 7
    assert all(QuantScheme(**options) == replace(scheme, qkv_bits=16) for options in linears.values())
    attentions = json.loads(metadata["attentions"])
    assert len(attentions) == 4 * scheme.quantizes_qkv
    assert metadata["format_version"] == "1"
    parts = ["integers", "weight_scale", "zero_point"] * scheme.quantizes_weights
    parts += ["act_multiplier", "act_clip_ratio"] * scheme.quantizes_activations
    parts += ["act_initial_scale", "act_zero_point"] * (scheme.act_granularity == "tensor")
    multipliers = {f"{name}.{part}.range_multiplier" for name in attentions for part in ("query", "key", "value")}
    assert set(tensors) == {f"{linear}.{part}" for linear in linears for part in parts} | multipliers
    for linear in linears:
        weight = weights[f"{linear}.weight"]
        if scheme.quantizes_activations:
            multiplier = tensors[f"{linear}.act_multiplier"]
            assert (multiplier.shape, multiplier.dtype) == ((), torch.float32)
        if not scheme.quantizes_weights:
            continue
        integers, scale, zero_point = (tensors[f"{linear}.{part}"] for part in parts[:3])
        assert (integers.dtype, scale.dtype, zero_point.dtype) == (torch.uint8, torch.float32, torch.uint8)
        rows, columns = weight.shape
        groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
        assert integers.shape == weight.shape
        assert scale.shape == zero_point.shape == (rows, groups)
        assert integers.max().item() < 2**scheme.weight_bits
        for row, column in ((0, 0), (rows // 2, columns // 2), (rows - 1, columns - 1), (1, columns - 2)):
            group = column // (columns // groups)
            steps = integers[row, column].item() - zero_point[row, group].item()
            assert weight[row, column].item() == pytest.approx(steps * scale[row, group].item(), rel=1e-6)


@pytest.mark.parametrize("damage", ["key.range_multiplier", "attentions"])
def test_damaged_attention(tiny_llama_folder, tmp_path, damage):
    loaded = finish(tiny_llama_folder, QuantScheme(4, 4, qkv_bits=4))
    save_checkpoint(loaded.model, loaded.tokenizer, tmp_path)

    def change(tensors, metadata):
        tensors.pop(f"model.layers.0.self_attn.{damage}", None)
        metadata.pop(damage, None)
        return metadata

    rewrite(tmp_path, change)
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(tmp_path)


def test_linears_of_different_schemes(tiny_llama_folder, tmp_path):
    overrides = [
        {"linears": r"blocks\.(0|-1)\..*down_proj", "weight_bits": 4, "group_size": 32},
        {"linears": r"blocks\.1\.self_attn\..*", "weight_bits": 16, "act_bits": 16},
    ]
    loaded = finish(tiny_llama_folder, QuantScheme(2, 8, overrides=overrides))
    save_checkpoint(loaded.model, loaded.tokenizer, tmp_path)
    again = load_checkpoint(tmp_path)
    assert torch.equal(logits(again.model), logits(loaded.model))
    schemes = {name: linear.scheme for name, linear in fused_linears(again.model)}
    assert schemes == {name: linear.scheme for name, linear in fused_linears(loaded.model)}
    assert {scheme.label for scheme in schemes.values()} == {"W2A8", "W4A8g32", "W16A16"}


@pytest.fixture(scope="module")
def whole_folder(tiny_llama_folder, tmp_path_factory) -> Path:
    folder, scheme = tmp_path_factory.mktemp("whole"), QuantScheme(4, 8)
    loaded = finish(tiny_llama_folder, scheme)
    save_checkpoint(loaded.model, loaded.tokenizer, folder)
    return folder


@pytest.fixture
def folder(whole_folder, tmp_path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(whole_folder, tmp_path / "checkpoint"))


def test_saving_again_replaces(folder, tiny_llama_folder):
    scheme = QuantScheme(3, 16)
    loaded = finish(tiny_llama_folder, scheme)
    save_checkpoint(loaded.model, loaded.tokenizer, folder)
    assert torch.equal(logits(load_checkpoint(str(folder)).model), logits(loaded.model))


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the tensors and the metadata of the quantized file."""
    with safe_open(folder / QUANTIZED_FILE, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = change(tensors, metadata)
    save_file(tensors, folder / QUANTIZED_FILE, metadata)


LINEAR = "model.layers.0.mlp.down_proj"
W4A8 = {"weight_bits": 4, "act_bits": 8}


def without_metadata(tensors, metadata):
    return None


def without_linears(tensors, metadata):
    return {key: value for key, value in metadata.items() if key != "linears"}


def linears_are_no_json(tensors, metadata):
    return metadata | {"linears": "{"}


def linears_are_a_list(tensors, metadata):
    return metadata | {"linears": f'["{LINEAR}"]'}


def scheme_is_out_of_range(tensors, metadata):
    return metadata | {"linears": json.dumps({LINEAR: {"weight_bits": 1, "act_bits": 4}})}


def scheme_has_an_unknown_field(tensors, metadata):
    return metadata | {"linears": json.dumps({LINEAR: {"weight_bits": 2, "act_bits": 4, "colour": 1}})}


def unknown_format(tensors, metadata):
    return metadata | {"format_version": "999"}


def unknown_linear(tensors, metadata):
    return metadata | {"linears": json.dumps({"model.layers.99.mlp.down_proj": W4A8})}


def linear_is_a_norm(tensors, metadata):
    return metadata | {"linears": json.dumps({"model.norm": W4A8})}


def without_integers(tensors, metadata):
    del tensors[f"{LINEAR}.integers"]
    return metadata


def without_scale(tensors, metadata):
    del tensors[f"{LINEAR}.weight_scale"]
    return metadata


def without_act_multiplier(tensors, metadata):
    del tensors[f"{LINEAR}.act_multiplier"]
    return metadata


def wrong_shape(tensors, metadata):
    tensors[f"{LINEAR}.integers"] = tensors[f"{LINEAR}.integers"][:, :-1].contiguous()
    return metadata


@pytest.mark.parametrize(
    "change",
    [
        without_metadata,
        without_linears,
        linears_are_no_json,
        linears_are_a_list,
        scheme_is_out_of_range,
        scheme_has_an_unknown_field,
        unknown_format,
        unknown_linear,
        linear_is_a_norm,
        without_integers,
        without_scale,
        without_act_multiplier,
        wrong_shape,
    ],
    ids=lambda change: change.__name__,
)
def test_damaged_content(folder, change):
    rewrite(folder, change)
    with pytest.raises(InputError):
        load_checkpoint(folder)


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_truncated_file(folder, size):
    content = (folder / QUANTIZED_FILE).read_bytes()
    (folder / QUANTIZED_FILE).write_bytes(content[:size])
    with pytest.raises(InputError, match=r"quantized\.safetensors cannot be read"):
        load_checkpoint(folder)


@pytest.mark.parametrize("missing", [QUANTIZED_FILE, "model.safetensors", "config.json", "."])
def test_missing_file(folder, missing):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError):
        load_checkpoint(folder)


def test_plain_model_folder_is_no_checkpoint(tiny_llama_folder):
    with pytest.raises(InputError, match="not a cbq checkpoint"):
        load_checkpoint(tiny_llama_folder)
