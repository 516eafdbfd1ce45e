"""The states of a linear against `nn.Linear`, and its finished form against both."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear

from cbq.errors import InputError
from cbq.quant.linear import (
    FusedLinear,
    QuantLinear,
    fuse,
    fuse_linears_,
    quant_linears,
    quantize_linears_,
)
from cbq.quant.rounding import AdaRound, DenseSTE, LoRARounding, LoRASTE, Nearest
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state

SCHEMES = [
    QuantScheme(2, 16, group_size=8),
    QuantScheme(4, 4),
    QuantScheme(8, 8, symmetric=True, act_symmetric=True),
    QuantScheme(16, 8),
    QuantScheme(3, 16),
]
LABELS = [scheme.label for scheme in SCHEMES]
KINDS = [Nearest, AdaRound, LoRARounding, DenseSTE, LoRASTE]


def make_linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 6, bias=bias, dtype=dtype)


def learn_something_(linear: QuantLinear, kind: type = DenseSTE) -> None:
    """Put `linear` into the state in which a solver leaves it, every learned value away from its start."""
    torch.manual_seed(1)
    if linear.weight_quantizer is not None:
        linear.rounding = kind(6, 16) if kind is Nearest else kind(6, 16, learning_rate=0.1)
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            if "multiplier" in name:
                parameter.uniform_(0.8, 1.2)
            elif name.startswith("rounding."):
                parameter.normal_()
    linear.rounding.harden_()
    linear.requires_grad_(False)
    linear.state = QuantState.LEARNED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_full_precision_is_bit_equal_to_nn_linear(scheme, bias, dtype):
    linear, x = make_linear(bias, dtype), torch.randn(2, 5, 16).to(dtype)
    assert torch.equal(QuantLinear(linear, scheme)(x), linear(x))


def test_bias_is_added_as_the_linear_itself_does():
    """Falcon's adds it to what is rounded already: in bfloat16 another sum on every machine."""
    torch.manual_seed(0)
    linear, x = FalconLinear(64, 32, dtype=torch.bfloat16), torch.randn(4, 8, 64, dtype=torch.bfloat16)
    assert not torch.equal(linear(x), F.linear(x, linear.weight, linear.bias)), "the test tells nothing"
    quant_linear = QuantLinear(linear, QuantScheme(4, 16))
    assert torch.equal(quant_linear(x), linear(x))
    learn_something_(quant_linear, Nearest)
    fused = fuse(quant_linear)
    with torch.no_grad():
        linear.weight.copy_(fused.weight)
    assert torch.equal(fused(x), linear(x))


def test_weight_and_bias_are_shared_and_frozen():
    linear = make_linear()
    quantized = QuantLinear(linear, QuantScheme(4, 4))
    assert quantized.weight is linear.weight
    assert quantized.bias is linear.bias
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_nearest_state_is_the_quantizers_and_ignores_what_was_learned(scheme):
    linear, x = make_linear(), torch.randn(3, 16)
    quantized = QuantLinear(linear, scheme)
    quantized.state = QuantState.NEAREST
    before = quantized(x)
    assert not torch.equal(before, linear(x))
    learn_something_(quantized)
    assert not torch.equal(quantized(x), before)
    with quant_state(quantized, QuantState.NEAREST):
        assert torch.equal(quantized(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)
def test_fused_is_bit_equal(scheme, kind, dtype):
    quantized, x = QuantLinear(make_linear(dtype=dtype), scheme), torch.randn(2, 5, 16).to(dtype)
    learn_something_(quantized, kind)
    fused = fuse(quantized)
    assert torch.equal(fused(x), quantized(x))
    assert fused(x).dtype == fused.weight.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.quantizes_weights], ids=lambda s: s.label)
def test_fused_weight_is_what_the_integers_say(scheme, kind):
    linear = make_linear()
    quantized = QuantLinear(linear, scheme)
    learn_something_(quantized, kind)
    fused = fuse(quantized)
    groups = 1 if scheme.group_size == -1 else 16 // scheme.group_size
    assert fused.integers.dtype == fused.zero_point.dtype == torch.uint8
    assert fused.weight_scale.dtype == torch.float32
    assert fused.integers.shape == (6, 16)
    assert fused.weight_scale.shape == fused.zero_point.shape == (6, groups)
    assert fused.integers.max() <= 2**scheme.weight_bits - 1
    for row in range(6):
        for column in range(16):
            group = column * groups // 16
            steps = int(fused.integers[row, column]) - int(fused.zero_point[row, group])
            expected = steps * fused.weight_scale[row, group].item()
            assert fused.weight[row, column].item() == pytest.approx(expected, rel=1e-6)
    # Rounding moves a weight by at most two steps, the step sizes (at most 20 % off) by as much as themselves.
    assert (fused.weight - linear.weight).abs().max() <= 0.25 * linear.weight.abs().max() + 2 * fused.weight_scale.max()


def test_fuse_leaves_an_unquantized_weight_alone():
    linear = make_linear()
    quantized = QuantLinear(linear, QuantScheme(16, 8))
    learn_something_(quantized)
    fused = fuse(quantized)
    assert fused.integers is fused.weight_scale is fused.zero_point is None
    assert torch.equal(fused.weight, linear.weight)
    assert quantized.integers() is None
    assert quantized.changed_integers() == (0, 0)


def test_fused_keeps_its_scale_when_the_quantizer_goes_on():
    quantized = QuantLinear(make_linear(), QuantScheme(4, 16))
    learn_something_(quantized)
    fused = fuse(quantized)
    before = fused.weight_scale.clone()
    quantized.weight_quantizer.initial_scale.mul_(2)
    assert torch.equal(fused.weight_scale, before)


def test_changed_integers_counts_known_flips():
    """Steps of 1, every weight 0.3 above an integer: an offset of 0.4 rounds up, one of 0.1 does not."""
    linear = make_linear()
    with torch.no_grad():
        linear.weight.copy_(torch.arange(16.0) + 0.3)
        linear.weight[:, 0], linear.weight[:, 15] = 0.0, 15.0
    quantized = QuantLinear(linear, QuantScheme(4, 16))
    rounding = quantized.rounding = DenseSTE(6, 16, learning_rate=0.1)
    assert quantized.changed_integers() == (0, 96)
    with torch.no_grad():
        rounding.offset_values[0, 3] = rounding.offset_values[4, 8] = rounding.offset_values[4, 9] = 0.4
        rounding.offset_values[1, 3] = 0.1  # not enough
        rounding.offset_values[2, 15] = 0.5  # at the end of the range
    assert quantized.changed_integers() == (3, 96)
    nearest = torch.arange(16, dtype=torch.uint8).repeat(6, 1)
    assert (quantized.integers() != nearest).nonzero().tolist() == [[0, 3], [4, 8], [4, 9]]


def test_quant_state_comes_back():
    """After an exception too, and to each linear's own state."""
    module = nn.Sequential(make_linear(), nn.Sequential(make_linear()))
    quantize_linears_(nn.ModuleList([module]), QuantScheme(4, 16))
    assert quant_linears(module) == [module[0], module[1][0]]
    first, second = quant_linears([module[0], module[1]])
    first.state, second.state = QuantState.LEARNED, QuantState.FULL_PRECISION

    def fail_inside() -> None:
        with quant_state(module, QuantState.NEAREST):
            assert first.state is second.state is QuantState.NEAREST
            with quant_state([module[1]], QuantState.LEARNED):
                assert second.state is QuantState.LEARNED
            assert second.state is QuantState.NEAREST
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert first.state is QuantState.LEARNED
    assert second.state is QuantState.FULL_PRECISION


class Mixed(nn.Module):
    """Linears at several depths among modules that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.embedding = nn.LayerNorm(16), nn.Embedding(4, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Conv1d(2, 2, 1)])
        self.table = nn.ModuleDict({"out": nn.Linear(16, 6, bias=False)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table["out"](self.blocks[1](self.blocks[0](self.norm(self.embedding(tokens)))))


def test_only_linears_are_replaced():
    torch.manual_seed(0)
    module, tokens = Mixed(), torch.tensor([[1, 3]])
    types = {name: type(child) for name, child in module.named_modules() if name}
    expected = module(tokens)
    quantize_linears_(nn.ModuleList([module]), QuantScheme(8, 8))
    places = ["blocks.0.0", "table.out"]
    assert [name for name, child in module.named_modules() if isinstance(child, QuantLinear)] == places
    others = {name: type(module.get_submodule(name)) for name in types if name not in places}
    assert others == {name: kind for name, kind in types.items() if kind is not nn.Linear}
    assert not any(isinstance(child, nn.Linear) for child in module.modules())
    assert torch.equal(module(tokens), expected)
    assert [(linear.out_features, linear.in_features) for linear in quant_linears(module)] == [(16, 16), (6, 16)]

    for linear in quant_linears(module):
        linear.state = QuantState.LEARNED
    quantized = module(tokens)
    fuse_linears_(module)
    assert [name for name, child in module.named_modules() if isinstance(child, FusedLinear)] == places
    assert not quant_linears(module)
    assert torch.equal(module(tokens), quantized)


def test_overrides_by_the_name_of_a_linear():
    """Blocks count from the first and from the last; the last override that matches wins."""
    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 8), "down": nn.Linear(8, 16)}) for _ in range(4))
    overrides = [
        {"linears": r".*\.down", "act_bits": 8, "group_size": 4},
        {"linears": r"blocks\.(0|-1)\.down", "weight_bits": 4},
        {"linears": r"blocks\.2\.up", "weight_bits": 16, "act_bits": 16},
        {"linears": r"blocks\.-1\.down", "weight_bits": 3},
    ]
    quantize_linears_(blocks, QuantScheme(2, 4, overrides=overrides))
    assert [block["up"].scheme.label for block in blocks] == ["W2A4", "W2A4", "W16A16", "W2A4"]
    assert [block["down"].scheme.label for block in blocks] == ["W4A8g4", "W2A8g4", "W2A8g4", "W3A8g4"]
    assert blocks[2]["up"].weight_quantizer is blocks[2]["up"].act_quantizer is None
    assert blocks[0]["down"].weight_quantizer.bits == 4
    assert blocks[0]["down"].weight_quantizer.scale.shape == (16, 2, 1)
    assert blocks[1]["down"].act_quantizer.bits == 8


@pytest.mark.parametrize("pattern", ["down", r"blocks\.4\.down", r"blocks\.-5\..*", r"blocks.0.down_"])
def test_an_override_that_matches_nothing_is_a_mistake(pattern):
    blocks = nn.ModuleList(nn.ModuleDict({"down": nn.Linear(8, 16)}) for _ in range(4))
    with pytest.raises(InputError, match=r"is the name of no linear; names are like blocks\.0\.down"):
        quantize_linears_(blocks, QuantScheme(2, 4, overrides=[{"linears": pattern, "weight_bits": 4}]))


def test_learned_state_passes_gradients_to_the_input():
    linear, x = make_linear(), torch.randn(3, 16, requires_grad=True)
    quantized = QuantLinear(linear, QuantScheme(8, 16))
    quantized.state = QuantState.LEARNED
    quantized(x).sum().backward()
    torch.testing.assert_close(x.grad, F.linear(torch.ones(3, 6), linear.weight.T), atol=0.05, rtol=0.05)
