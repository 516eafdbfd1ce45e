"""Scaling methods on a small LLaMA with outliers put in, against their formulas written out on the plain model."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import add_outliers_, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbq.errors import InputError
from cbq.models.equivalent import shift_channels_
from cbq.models.families import get_blocks, scaling_pairs
from cbq.models.pairs import ScalingPair
from cbq.preprocess.by_scheme import ByScheme
from cbq.preprocess.chain import Chain
from cbq.preprocess.clipping import SmallestError
from cbq.preprocess.none import NoPreprocessing
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
from cbq.quantized import make_quantizable_

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
        for last in (block.self_attn.v_proj, block.mlp.up_proj):  # what is best for it is not for the first
            last.weight[:, OUTLIER] *= 8
    return model


@pytest.fixture
def model(plain: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(plain)
    quantize_linears_(get_blocks(model), QuantScheme(4, 4))
    return model


def linear_inputs(model: nn.Module, segments: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the input of every linear of a model, (tokens, in_features), by name."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: found.update({name: args[0].flatten(0, -2)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantLinear)
    ]
    model(segments)
    for hook in hooks:
        hook.remove()
    return found


@pytest.fixture
def inputs(plain: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The input of every linear of the plain model, (tokens, in_features), by name."""
    return linear_inputs(plain, SEGMENTS)


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


def rounded_rows(rows: torch.Tensor, bits: int, ratios: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Return each row of (R, n) cut off at a share of its range, one or (R, 1), and rounded, by torch's operator."""
    if bits == 16:
        return rows
    low, high = rows.amin(1, keepdim=True).clamp_max(0) * ratios, rows.amax(1, keepdim=True).clamp_min(0) * ratios
    steps = ((high - low) / (2**bits - 1)).flatten()
    zero_points = (-low.flatten() / steps).round().to(torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, steps, zero_points, 0, 0, 2**bits - 1)


def output_error(
    linear: nn.Linear, x: torch.Tensor, scale: torch.Tensor, weight_bits: int = 4, act_bits: int = 4
) -> torch.Tensor:
    """Return the squared errors of a linear whose weight rows and input tokens are rounded by torch's operator."""
    quantized = rounded_rows(x / scale, act_bits) @ rounded_rows(linear.weight * scale, weight_bits).T
    return (quantized - x @ linear.weight.T).square()


def thresholds(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the scales that OS+ tries for inputs x (tokens, I), one of them none."""
    maxima = x.abs().amax(0)
    return [(maxima / (maxima.max() * (1 - step / 8))).clamp_min(1) for step in range(8)]


def exponents(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the scales that AWQ tries for inputs x (tokens, I), one of them none."""
    scales = [x.abs().mean(0).pow(step / 8) for step in range(8)]
    return [scale / (scale.max() * scale.min()).sqrt() for scale in scales]


@pytest.mark.parametrize(
    ("method", "candidates", "act_bits"),
    [
        (OutlierSuppressionPlus(grid=8), thresholds, 4),
        (ActivationAware(grid=8), exponents, 16),
        (ActivationAware(grid=8, clip=False), exponents, 4),
    ],
    ids=["os_plus", "awq", "awq on activations too"],
)
def test_the_best_scale_of_all_consumers_is_taken(plain, inputs, method, candidates, act_bits) -> None:
    """After every norm, by brute force; the best for the first linear alone would be another; scaling is worth it."""
    model = copy.deepcopy(plain)
    quantize_linears_(get_blocks(model), QuantScheme(3, act_bits))
    method.apply_(model, get_blocks(model), SEGMENTS)
    differ, gains = 0, []
    for number, (block, before) in enumerate(zip(get_blocks(model), get_blocks(plain), strict=True)):
        for norm, names in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            x = inputs[f"model.layers.{number}.{names[0]}"]
            linears = [before.get_submodule(name) for name in names]
            # Candidate, linear.
            errors = torch.tensor(
                [[output_error(one, x, s, 3, act_bits).sum() for one in linears] for s in candidates(x)]
            )
            best = errors.sum(1).argmin()
            taken = before.get_submodule(norm).weight / block.get_submodule(norm).weight
            torch.testing.assert_close(taken, candidates(x)[best], rtol=1e-4, atol=1e-5)
            differ += int(errors[:, 0].argmin() != best)
            gains.append((errors.sum(1)[best] / errors[0].sum()).item())
    assert differ
    assert min(gains) < 0.6


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


RATIOS = torch.tensor([1 - step / 20 for step in range(15)])  # of a group's range


@pytest.mark.parametrize("group_size", [-1, 32])
def test_awq_clips_each_group_for_its_inputs(plain, group_size) -> None:
    """Every linear, by brute force on what the scaled model feeds it."""
    model = copy.deepcopy(plain)
    quantize_linears_(get_blocks(model), QuantScheme(3, 16, group_size))
    ActivationAware(grid=6).apply_(model, get_blocks(model), SEGMENTS)
    found = linear_inputs(model, SEGMENTS)
    unclipped, blind, count = 0, 0, 0
    for name, linear in model.named_modules():
        if not isinstance(linear, QuantLinear):
            continue
        size = linear.in_features if group_size == -1 else group_size
        quantizer, x = linear.weight_quantizer, found[name]
        integers = quantizer.starting_integers(linear.weight) - quantizer.initial_zero_point
        taken = (integers * quantizer.initial_scale).flatten(1)
        for start in range(0, linear.in_features, size):
            part = slice(start, start + size)
            rows = linear.weight[:, part]
            tried = torch.stack([rounded_rows(rows, 3, ratio) for ratio in RATIOS])  # ratio, row, feature
            errors = ((tried - rows) @ x[:, part].T).square().sum(-1)
            error = ((taken[:, part] - rows) @ x[:, part].T).square().sum(-1)
            torch.testing.assert_close(error, errors.amin(0), rtol=1e-3, atol=1e-6)
            of_weights = (tried - rows).square().sum(-1).argmin(0)
            blind += (errors.gather(0, of_weights[None])[0] > 1.01 * error).sum().item()
            unclipped += (errors[0] > 1.01 * error).sum().item()
            count += len(rows)
    assert unclipped > 0.3 * count, "clipping is worth it"
    assert blind > 0.3 * count, "the inputs decide how much"


@pytest.mark.parametrize("name", ["opt", "phi", "bloom"])
def test_os_plus_shifts_channels_where_norms_and_linears_have_biases(name) -> None:
    """What each linear after a norm then reads is symmetric about 0, and its bias makes up for the rest; the scale is
    the best for that."""
    plain, segments = tiny_model(name), token_ids()
    add_outliers_(plain, 20.0)
    model = copy.deepcopy(plain)
    make_quantizable_(model, get_blocks(model), QuantScheme(4, 4))
    OutlierSuppressionPlus(grid=8).apply_(model, get_blocks(model), segments)
    torch.testing.assert_close(model(segments).logits, plain(segments).logits, rtol=1e-3, atol=1e-3)
    before, after = linear_inputs(plain, segments), linear_inputs(model, segments)
    names = {module: path for path, module in model.named_modules()}
    for block, old in zip(get_blocks(model), get_blocks(plain), strict=True):
        for pair in scaling_pairs(model.config, block):
            if isinstance(block.get_submodule(pair.producer), QuantLinear):
                continue
            norm, old_norm = block.get_submodule(pair.producer), old.get_submodule(pair.producer)
            assert not torch.equal(norm.bias, old_norm.bias)
            for consumer in pair.consumers:
                x, y = (inputs[names[block.get_submodule(consumer)]] for inputs in (before, after))
                assert ((y.amax(0) + y.amin(0)).abs() < 1e-4 * (y.amax(0) - y.amin(0))).all()
                assert (x.amax(0) + x.amin(0)).abs().max() > 0.3, "it was not"
                middle = (x.amax(0) + x.amin(0)) / 2
                expected = old.get_submodule(consumer)(middle)
                torch.testing.assert_close(block.get_submodule(consumer).bias, expected, rtol=1e-4, atol=1e-4)
            scales = thresholds(x - middle)
            linears = [old.get_submodule(consumer) for consumer in pair.consumers]
            errors = [sum(output_error(one, x - middle, scale).sum() for one in linears) for scale in scales]
            best = scales[errors.index(min(errors))]
            torch.testing.assert_close(old_norm.weight / norm.weight, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_os_plus_shifts_nothing_after_norms_without_bias(name) -> None:
    """Every token is divided by the same factors; Qwen2's linears have biases, which stay."""
    plain, segments = tiny_model(name), token_ids()
    model = copy.deepcopy(plain)
    make_quantizable_(model, get_blocks(model), QuantScheme(4, 4))
    OutlierSuppressionPlus(grid=8).apply_(model, get_blocks(model), segments)
    before, after = linear_inputs(plain, segments), linear_inputs(model, segments)
    for block, old in zip(range(4), get_blocks(plain), strict=True):
        x, y = (inputs[f"model.layers.{block}.self_attn.q_proj"] for inputs in (before, after))
        factors = get_blocks(model)[block].input_layernorm.weight / old.input_layernorm.weight
        torch.testing.assert_close(y, x * factors, rtol=1e-3, atol=1e-3)
        assert (factors < 0.99).any(), "some are scaled"
    kept = dict(model.named_parameters())
    assert all(torch.equal(kept[key], value) for key, value in plain.named_parameters() if key.endswith("bias"))


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


@pytest.mark.parametrize("without", [None, "norm", "first", "second"])
@pytest.mark.parametrize("option", [True, False])
def test_os_plus_shifts_where_all_have_biases(option, without) -> None:
    torch.manual_seed(0)
    block, x = WithBias().requires_grad_(False), torch.randn(200, 16)
    block.norm.bias[3] = 40.0
    if without:
        getattr(block, without).bias = None
    shift = option and not without
    expected = block(x)
    for name in ("first", "second"):
        setattr(block, name, QuantLinear(getattr(block, name), QuantScheme(4, 4)))
    inputs = block.norm(x)
    low, high = inputs.amin(0), inputs.amax(0)
    statistics = {name: InputStatistics(low, high, inputs.abs().mean(0), inputs.clone()) for name in PAIR.consumers}
    OutlierSuppressionPlus(shift=option).scale_(Channels(PAIR, block, statistics))
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


NO_CHANNELS = "scales nothing: this model has no channels that it can scale"


@pytest.mark.parametrize("method", METHODS[:4], ids=name_of)
@pytest.mark.parametrize("name", ["opt-norm-after", "opt-no-gains", "bloom-norm-in-residual", "opt", "llama"])
def test_a_scaling_that_scales_nothing_says_so(name, method) -> None:
    """It says so exactly where it leaves every parameter as it was; also as a step among others."""
    model, segments = tiny_model(name), token_ids(2, 8)
    make_quantizable_(model, get_blocks(model), QuantScheme(4, 4))
    before = {key: value.clone() for key, value in model.named_parameters()}
    expected = [f"preprocess: {name_of(method)} {NO_CHANNELS}"]
    chained = Chain({"scale": ByScheme(NoPreprocessing(), method), "clip": SmallestError()})
    notes = method.notes(model), chained.notes(model)
    assert ByScheme(method, NoPreprocessing()).notes(model) == []
    method.apply_(model, get_blocks(model), segments)
    changed = any(not torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert notes == (([], []) if changed else (expected, expected))
    assert changed == (name in ("opt", "llama") or isinstance(method, ActivationAware))
