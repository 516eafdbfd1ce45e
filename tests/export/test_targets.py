"""What engines compute, told before calibration."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hydra.core.override_parser.overrides_parser import OverridesParser

from cbq.errors import InputError
from cbq.export.targets import VLLM, AutoRound, NoTarget, Target, Transformers
from cbq.quant.linear import make_act_quantizer
from cbq.quant.quantizer import WeightQuantizer
from cbq.quant.scheme import QuantScheme


def test_no_target_changes_nothing():
    scheme = QuantScheme(3, 5, qkv_bits=4)
    assert NoTarget().constrain(scheme) is scheme


@pytest.mark.parametrize(
    ("target", "scheme", "said"),
    [
        (VLLM(), QuantScheme(2, 16), "vllm cannot run W2A16; the nearest that it can: quant.weight_bits=4"),
        (VLLM(), QuantScheme(4, 16, group_size=48), "quant.group_size=64"),
        (VLLM(), QuantScheme(4, 4), "the nearest that it can: quant.act_bits=8"),
        (VLLM(), QuantScheme(6, 6), "the nearest that it can: quant.weight_bits=8 quant.act_bits=8"),
        (VLLM(), QuantScheme(8, 8, group_size=32), "quant.group_size=-1"),
        (VLLM(), QuantScheme(8, 8, act_granularity="tensor"), "quant.act_granularity=token"),
        (AutoRound(), QuantScheme(4, 4), "the nearest that it can: quant.act_bits=16"),
        (AutoRound(), QuantScheme(5, 16), "the nearest that it can: quant.weight_bits=4"),
        (Transformers(), QuantScheme(16, 8), "the nearest that it can: quant.weight_bits=8"),
        (Transformers(), QuantScheme(4, 4, qkv_bits=4), "quant.qkv_bits=16"),
    ],
    ids=lambda value: value.label if isinstance(value, QuantScheme) else getattr(value, "name", ""),
)
def test_what_an_engine_cannot_run_is_refused_with_the_nearest(target, scheme, said):
    with pytest.raises(InputError, match=r"^target=") as error_info:
        target.constrain(scheme)
    assert said in str(error_info.value)


def refusal(target: Target, scheme: QuantScheme) -> str | None:
    """Return what a target says of a scheme that it cannot run."""
    try:
        target.constrain(scheme)
    except InputError as error:
        return str(error)
    return None


CHOICES = {
    "weight_bits": (2, 3, 4, 5, 6, 7, 8, 16),
    "act_bits": (4, 6, 8, 16),
    "group_size": (-1, 16, 32, 48, 128, 256),
    "symmetric": (False, True),
    "act_granularity": ("token", "tensor"),
    "qkv_bits": (4, 16),
}


@pytest.mark.parametrize("target", [Transformers(), VLLM(), AutoRound()], ids=lambda target: target.name)
def test_the_nearest_is_accepted_and_no_farther_than_it_must_be(target):
    """Of every scheme: what a refusal recommends is not refused again, and none of it can be left out."""
    refused = 0
    for values in product(*CHOICES.values()):
        options = dict(zip(CHOICES, values, strict=True))
        said = refusal(target, QuantScheme(**options))
        if said is None:
            continue
        refused += 1
        advice = said.partition("the nearest that it can: ")[2].split()
        pairs = dict(word.removeprefix("quant.").split("=") for word in advice)
        changed = {key: type(options[key])(value) for key, value in pairs.items()}
        assert changed
        assert refusal(target, QuantScheme(**options | changed)) is None, (options, changed)
        for key in changed:
            less = options | {name: value for name, value in changed.items() if name != key}
            in_full_precision = less["weight_bits"] == less["act_bits"] == 16
            assert in_full_precision or refusal(target, QuantScheme(**less)), (options, changed, key)
    assert refused > 700


@pytest.mark.parametrize("target", [Transformers(), VLLM(), AutoRound()], ids=lambda target: target.name)
@pytest.mark.parametrize("override", [{"weight_bits": 3}, {"act_bits": 6}, {"group_size": 48}, {"weight_bits": 16}])
def test_of_an_override_the_nearest_is_the_override_to_type(target, override):
    bits = (4, 16) if target.name == "autoround" else (8, 8)
    overrides = [{"linears": r"blocks\.-1\..*", "weight_bits": 4}, {"linears": ".*down_proj", **override}]
    scheme = QuantScheme(*bits, overrides=overrides)
    said = refusal(target, scheme)
    if said is None:
        assert target.name == "transformers" or override["weight_bits"] in (3, 16)
        return
    assert "quant.overrides make of '.*down_proj'" in said
    typed = said.partition("the nearest that it can: '")[2].removesuffix("'")
    parsed = OverridesParser.create().parse_override(typed).value()  # as the command line reads it
    corrected = [{str(key): str(v) if key == "linears" else v for key, v in each.items()} for each in parsed]
    assert corrected[0] == overrides[0]
    assert refusal(target, replace(scheme, overrides=corrected)) is None


def test_constraints():
    found = Transformers().constrain(QuantScheme(4, 16))
    assert (found.symmetric, found.scale_dtype) == (True, "weight")
    found = Transformers().constrain(QuantScheme(4, 4))
    assert (found.symmetric, found.act_symmetric, found.engine_activations) == (False, False, True)
    assert VLLM().constrain(QuantScheme(4, 16)) == QuantScheme(4, 16, scale_dtype="bfloat16")
    found = VLLM().constrain(QuantScheme(8, 8))
    assert (found.symmetric, found.act_symmetric, found.act_denominator) == (True, True, 127)
    found = VLLM().constrain(QuantScheme(4, 8, act_symmetric=True, act_denominator=127))
    assert (found.symmetric, found.act_symmetric, found.act_denominator) == (True, False, None)
    for symmetric in (False, True):
        found = AutoRound().constrain(QuantScheme(3, 16, group_size=64, symmetric=symmetric))
        assert (found.symmetric, found.scale_dtype) == (symmetric, "float16")


def test_overrides_are_constrained_each():
    overrides = [
        {"linears": ".*down_proj", "weight_bits": 4, "act_bits": 16},
        {"linears": ".*o_proj", "weight_bits": 16, "act_bits": 16},
    ]
    found = VLLM().constrain(QuantScheme(8, 8, overrides=overrides))
    assert found.of_linear(["blocks.0.mlp.up_proj"]).act_denominator == 127
    down = found.of_linear(["blocks.0.mlp.down_proj"])
    assert (down.label, down.symmetric, down.act_denominator, down.scale_dtype) == ("W4A16", False, None, "bfloat16")
    assert not found.of_linear(["blocks.0.self_attn.o_proj"]).is_quantized
    with pytest.raises(InputError, match="cannot run W2A8"):
        VLLM().constrain(QuantScheme(8, 8, overrides=[{"linears": ".*", "weight_bits": 2}]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_the_librarys_to_the_bit(bits, symmetric):
    """Where a zero point is added after rounding, other integers come out now and then."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, 1024, generator=generator) + torch.randn(4, 256, 1, generator=generator)
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, arguments, None)
    scheme = Transformers().constrain(QuantScheme(4, bits, act_symmetric=symmetric))
    quantizer = make_act_quantizer(scheme)
    assert torch.equal(quantizer(x), fake_quantize(x, scale, zero_point, arguments))
    assert torch.equal(quantizer.nearest(x), quantizer(x))


def test_activations_of_an_engine_have_a_gradient():
    quantizer = make_act_quantizer(Transformers().constrain(QuantScheme(4, 8)))
    x = torch.randn(2, 3, 16, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.count_nonzero() > 0.9 * x.numel()
    assert quantizer.range_multiplier.grad is None or not quantizer.range_multiplier.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_what_the_type_holds_in_every_forward(dtype):
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    weight[0] = 0  # its scale is far below what float16 holds
    quantizer = WeightQuantizer(weight, 4, group_size=16, symmetric=True, scale_dtype=dtype)
    torch.nn.init.uniform_(quantizer.step_size.multiplier, 0.9, 1.1)
    scale = quantizer.scale
    assert torch.equal(scale.to(dtype).float(), scale)
    assert (scale > 0).all()
    scale.sum().backward()
    assert quantizer.step_size.multiplier.grad[1:].all()
    integers = quantizer.nearest(weight).unflatten(-1, (2, 16)) / quantizer.initial_scale
    assert torch.allclose(integers, integers.round(), atol=1e-3)


def test_overrides_that_only_together_are_too_much():
    """Each can be run; the linear that both match cannot."""
    overrides = [{"linears": ".*mlp.*", "act_bits": 8}, {"linears": ".*down_proj", "group_size": 32}]
    scheme = VLLM().constrain(QuantScheme(4, 16, overrides=overrides))
    schemes = {name: scheme.of_linear([name]) for name in ("q_proj", "mlp.up_proj", "mlp.down_proj")}
    with pytest.raises(InputError, match=r"target=vllm cannot run .*mlp.down_proj"):
        VLLM().check(schemes)
    del schemes["mlp.down_proj"]
    VLLM().check(schemes)
