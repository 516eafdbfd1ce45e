"""The layout of GPTQ, unpacked here one number at a time."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cbq.errors import InputError
from cbq.export.gptq import GPTQ, AutoRound
from cbq.export.targets import AutoRound as Target
from cbq.quant.linear import fused_linears
from cbq.quant.scheme import QuantScheme


def unpack(words: torch.Tensor, bits: int) -> list[list[int]]:
    """Return the numbers of each column of `words` (W, C), read as one stream of bits, lowest first."""
    columns = []
    for column in words.T.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(column))
        columns.append([stream >> (bits * index) & (2**bits - 1) for index in range(len(column) * 32 // bits)])
    return columns


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, -1), (3, 32), (4, 64), (8, 32)])
def test_tensors_are_as_the_layout_says(finished, tmp_path, bits, group_size, symmetric):
    loaded = finished(QuantScheme(bits, 16, group_size=group_size, symmetric=symmetric, scale_dtype="float16"))
    GPTQ().write(loaded.model, loaded.tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    for name, linear in fused_linears(loaded.model)[:7]:
        parts = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert f"{name}.weight" not in tensors
        assert unpack(parts["qweight"], bits) == linear.integers.tolist()
        zeros = torch.tensor(unpack(parts["qzeros"].T.contiguous(), bits)) + int(symmetric)
        assert torch.equal(zeros.T, linear.zero_point.long())
        assert parts["scales"].dtype == torch.float16
        assert torch.equal(parts["scales"].float().T, linear.weight_scale)
        rows = linear.weight_scale[:, parts["g_idx"].long()] * (
            linear.integers.float() - linear.zero_point.float()[:, parts["g_idx"].long()]
        )
        assert torch.equal(rows, linear.weight)


def test_autoround_has_the_same_tensors(finished, tmp_path):
    loaded = finished(QuantScheme(4, 16), Target())
    for number, format in enumerate((GPTQ(), AutoRound())):
        format.write(loaded.model, loaded.tokenizer, tmp_path / str(number))
    first, second = (load_file(tmp_path / number / "model.safetensors") for number in "01")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((tmp_path / "1" / "config.json").read_text())["quantization_config"]
    assert config["block_name_to_quantize"] == "model.layers"


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (QuantScheme(4, 8, scale_dtype="float16"), "no activations: target=autoround"),
        (QuantScheme(5, 16, scale_dtype="float16"), "weights of 2, 3, 4, 8 bits"),
        (QuantScheme(4, 16), "scales are stored in float16"),
        (
            QuantScheme(4, 16, scale_dtype="float16", overrides=[{"linears": ".*q_proj", "weight_bits": 16}]),
            r"one scheme for all linears of the blocks, and model\.layers\.0\.self_attn\.q_proj has none",
        ),
        (
            QuantScheme(4, 16, scale_dtype="float16", overrides=[{"linears": ".*q_proj", "weight_bits": 8}]),
            "one scheme for all linears, not W4A16, W8A16",
        ),
    ],
    ids=["activations", "bits", "scales", "left out", "overrides"],
)
def test_what_has_no_place_is_refused(finished, scheme, said):
    with pytest.raises(InputError, match=said):
        GPTQ().check(finished(scheme).model)


@pytest.mark.parametrize(("format", "package"), [(GPTQ(), "gptqmodel"), (AutoRound(), "auto_round")])
def test_an_engine_is_found_by_its_package(monkeypatch, format, package):
    for there in (package, None):
        monkeypatch.setattr("cbq.export.gptq.find_spec", lambda name, there=there: there if name == there else None)
        assert format.is_installed() is (there is not None)


@pytest.mark.parametrize(("bits", "group_size", "warned"), [(4, -1, 1), (4, 16, 1), (4, 32, 0), (3, -1, 0)])
def test_what_no_cpu_kernel_runs_is_said(bits, group_size, warned):
    """Of GPTQModel: the folder loads, and the first forward fails. AutoRound has kernels."""
    schemes = {"a": QuantScheme(bits, 16, group_size=group_size, symmetric=True)}
    found = [note for note in GPTQ().notes(schemes) if "does not run" in note]
    assert len(found) == warned
    assert not warned or f"CPU kernel does not run {schemes['a'].label}:" in found[0]
    assert not any("does not run" in note for note in AutoRound().notes(schemes))
