"""Scaling methods on a small LLaMA with outliers put in, against their formulas written out on the plain model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbq.errors import InputError
from cbq.models.equivalent import shift_channels_
from cbq.models.families import get_blocks
from cbq.models.pairs import ScalingPair
from cbq.preprocess.scaling import (
    ActivationAware,
    Channels,
    ChannelScaling,
    OutlierSuppression,
    OutlierSuppressionPlus,
    SmoothQuant,
)
from cbq.preprocess.statistics import InputStatistics
from cbq.quant.linear import QuantLinear, quant_linears, quantize_linears_
from cbq.quant.scheme import QuantScheme

SEGMENTS = torch.randint(320, (6, 24), generator=torch.Generator().manual_seed(0))
OUTLIER = 5
METHODS = [
    SmoothQuant(),
    OutlierSuppression(),
    OutlierSuppressionPlus(),
    ActivationAware(),
    ActivationAware(clip=False),
]


def name_of(method: ChannelScaling) -> str:
    return type(method).__name__


@pytest.fixture
def plain(tiny_llama_folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)
    for block in get_blocks(model):
        block.input_layernorm.weight[OUTLIER] *= -50
        block.post_attention_layernorm.weight[OUTLIER] *= 50
    return model


@pytest.fixture
def model(plain: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(plain)
    quantize_linears_(get_blocks(model), QuantScheme(4, 4))
    return model


@pytest.fixture
def inputs(plain: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The input of every linear of the plain model, (tokens, in_features), by name."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: found.update({name: args[0].flatten(0, 1)}))
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear)
    ]
    plain(SEGMENTS)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_the_function_stays_and_the_quantizers_fit(model, method) -> None:
    expected = model(SEGMENTS).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method.apply_(model, get_blocks(model), SEGMENTS)
    torch.testing.assert_close(model(SEGMENTS).logits, expected, rtol=1e-3, atol=1e-3)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any("input_layernorm" in name for name in changed)
    for linear in quant_linears(model):
        whole = (linear.weight.amax(1).clamp_min(0) - linear.weight.amin(1).clamp_max(0)) / 15
        scale = linear.weight_quantizer.initial_scale.flatten()
        assert (scale <= whole * 1.0001).all()
        if not getattr(method, "clip", False):
            torch.testing.assert_close(scale, whole)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_formula(model, plain, inputs, alpha) -> None:
    SmoothQuant(alpha).apply_(model, get_blocks(model), SEGMENTS)
    for number, (block, before) in enumerate(zip(get_blocks(model), get_blocks(plain), strict=True)):
        for norm, parent, names in (
            ("input_layernorm", "self_attn", ("q_proj", "k_proj", "v_proj")),
            ("post_attention_layernorm", "mlp", ("gate_proj", "up_proj")),
        ):
            linears = [before.get_submodule(f"{parent}.{name}") for name in names]
            x = inputs[f"model.layers.{number}.{parent}.{names[0]}"].abs().amax(0)
            w = torch.cat([linear.weight for linear in linears]).abs().amax(0)
            s = x**alpha / w ** (1 - alpha)
            torch.testing.assert_close(block.get_submodule(norm).weight, before.get_submodule(norm).weight / s)
            for name, linear in zip(names, linears, strict=True):
                torch.testing.assert_close(block.get_submodule(f"{parent}.{name}").weight, linear.weight * s)
        assert torch.equal(block.self_attn.o_proj.weight, before.self_attn.o_proj.weight)
        assert torch.equal(block.mlp.down_proj.weight, before.mlp.down_proj.weight)


def test_gamma_migration_leaves_norms_of_one(model, plain) -> None:
    get_blocks(model)[1].input_layernorm.weight[3] = 0
    OutlierSuppression().apply_(model, get_blocks(model), SEGMENTS)
    for number, (block, before) in enumerate(zip(get_blocks(model), get_blocks(plain), strict=True)):
        expected = torch.ones_like(block.input_layernorm.weight)
        if number == 1:
            expected[3] = 0
        else:
            gamma = before.input_layernorm.weight
            torch.testing.assert_close(block.self_attn.k_proj.weight, before.self_attn.k_proj.weight * gamma)
        torch.testing.assert_close(block.input_layernorm.weight, expected)


def output_error(linear: nn.Linear, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the squared errors of a linear whose weight rows and input tokens are rounded by torch's operator."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        out = []
        for row in rows:
            low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
            step = (high - low) / 15
            out.append(torch.fake_quantize_per_tensor_affine(row, step, round(-low / step), 0, 15))
        return torch.stack(out)

    return (rounded(x / scale) @ rounded(linear.weight * scale).T - x @ linear.weight.T).square()


def test_os_plus_takes_the_best_threshold(model, plain, inputs) -> None:
    """Of all thresholds, by brute force; and it is better than no scaling where there is an outlier."""
    OutlierSuppressionPlus(grid=8).apply_(model, get_blocks(model), SEGMENTS)
    block, before = get_blocks(model)[0], get_blocks(plain)[0]
    x = inputs["model.layers.0.mlp.gate_proj"]
    maxima = x.abs().amax(0)
    linears = [before.mlp.gate_proj, before.mlp.up_proj]
    scales = [(maxima / (maxima.max() * (1 - step / 8))).clamp_min(1) for step in range(8)]
    errors = [torch.cat([output_error(linear, x, scale).flatten() for linear in linears]).mean() for scale in scales]
    taken = before.post_attention_layernorm.weight / block.post_attention_layernorm.weight
    taken_error = torch.cat([output_error(linear, x, taken).flatten() for linear in linears]).mean()
    assert taken_error.item() == pytest.approx(min(errors).item(), rel=0.01)
    assert min(errors) < 0.5 * errors[0]


def test_awq_takes_the_best_exponent(model, plain, inputs) -> None:
    """Between values and the output projection, where two query heads read one value head."""
    ActivationAware(grid=6, clip=False).apply_(model, get_blocks(model), SEGMENTS)
    block, before = get_blocks(model)[2], get_blocks(plain)[2]
    x = inputs["model.layers.2.self_attn.o_proj"]
    heads = x.abs().mean(0).view(2, 2, 16).amax(1)  # value head, its readers, channels

    def scale_of(step: int) -> torch.Tensor:
        scale = heads.clamp_min(1e-4).pow(step / 6)
        return (scale / (scale.max() * scale.min()).sqrt())[:, None].expand(2, 2, 16).flatten()

    errors = [output_error(before.self_attn.o_proj, x, scale_of(step)).mean().item() for step in range(6)]
    taken = (before.self_attn.v_proj.weight[:, 0] / block.self_attn.v_proj.weight[:, 0]).view(2, 1, 16)
    taken_error = output_error(before.self_attn.o_proj, x, taken.expand(2, 2, 16).flatten()).mean().item()
    assert taken_error == pytest.approx(min(errors), rel=0.01)


class WithBias(nn.Module):
    """A layer norm and the two linears that read it, as OPT has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return torch.cat([self.first(x), self.second(x)], -1)


PAIR = ScalingPair("norm", ("first", "second"), head_dim=4)


def test_shifting_keeps_the_function() -> None:
    torch.manual_seed(0)
    block, x = WithBias().requires_grad_(False), torch.randn(10, 16)
    expected, before = block(x), block.norm(x)
    shift = torch.randn(16) * 5
    shift_channels_(PAIR, block, shift)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.norm(x), before - shift, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [True, False])
def test_os_plus_shifts_where_there_are_biases(shift) -> None:
    torch.manual_seed(0)
    block, x = WithBias().requires_grad_(False), torch.randn(200, 16)
    block.norm.bias[3] = 40.0
    expected = block(x)
    for name in ("first", "second"):
        setattr(block, name, QuantLinear(getattr(block, name), QuantScheme(4, 4)))
    inputs = block.norm(x)
    low, high = inputs.amin(0), inputs.amax(0)
    statistics = {name: InputStatistics(low, high, inputs.abs().mean(0), inputs.clone()) for name in PAIR.consumers}
    OutlierSuppressionPlus(shift=shift).scale_(Channels(PAIR, block, statistics))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)
    after = block.norm(x)
    off_center = ((after.amax(0) + after.amin(0)) / (after.amax(0) - after.amin(0))).abs()
    assert (off_center.max() < 1e-4) == shift
    for name in PAIR.consumers:
        torch.testing.assert_close(statistics[name].sample, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *[(SmoothQuant, {"alpha": value}, "preprocess.alpha") for value in (-0.1, 1.1, True, "0.5", None)],
        *[(OutlierSuppressionPlus, {"grid": value}, "preprocess.grid") for value in (0, 1.5, True, "8")],
        (OutlierSuppressionPlus, {"shift": 1}, "preprocess.shift must be true or false"),
        (ActivationAware, {"grid": 0}, "preprocess.grid"),
        (ActivationAware, {"clip": "yes"}, "preprocess.clip must be true or false"),
    ],
)
def test_bad_options(method, options, message) -> None:
    with pytest.raises(InputError, match=message):
        method(**options)


def test_full_precision_weights_have_no_range(tiny_llama_folder: Path) -> None:
    for method in METHODS:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).requires_grad_(False)
        quantize_linears_(get_blocks(model), QuantScheme(16, 4, act_granularity="tensor"))
        expected = model(SEGMENTS).logits
        method.apply_(model, get_blocks(model), SEGMENTS)
        torch.testing.assert_close(model(SEGMENTS).logits, expected, rtol=1e-3, atol=1e-3)
