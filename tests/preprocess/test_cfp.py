"""Coarse-to-fine preprocessing on a small LLaMA with outliers put in."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.preprocess.cfp import CoarseToFine
from cbq.preprocess.outliers import largest_reserved
from cbq.preprocess.statistics import input_statistics
from cbq.quant.linear import QuantLinear, quant_linears, quantize_linears_
from cbq.quant.scheme import QuantScheme

SEGMENTS = torch.randint(320, (6, 24), generator=torch.Generator().manual_seed(0))
OUTLIER = 5


@pytest.fixture
def model(tiny_llama_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)
    for block in get_blocks(model):
        block.input_layernorm.weight[OUTLIER] *= 100
        block.mlp.gate_proj.weight[3:11, 7] = 20.0
    quantize_linears_(get_blocks(model), QuantScheme(4, 4))
    return model


def test_off_means_untouched(model) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    CoarseToFine(weights=False, activations=False).apply_(model, get_blocks(model), SEGMENTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("relative_to", ["reserved", "largest"])
def test_the_function_stays(model, relative_to: str) -> None:
    expected = model(SEGMENTS).logits
    CoarseToFine(True, True, relative_to=relative_to).apply_(model, get_blocks(model), SEGMENTS)
    torch.testing.assert_close(model(SEGMENTS).logits, expected, rtol=1e-3, atol=1e-3)


def test_an_outlier_channel_is_brought_to_the_geometric_mean(model) -> None:
    before = [ranges["self_attn.q_proj"].maxima for ranges in input_statistics(model, get_blocks(model), SEGMENTS)]
    weights = [block.self_attn.k_proj.weight.clone() for block in get_blocks(model)]
    CoarseToFine(False, True).apply_(model, get_blocks(model), SEGMENTS)
    after = [ranges["self_attn.q_proj"].maxima for ranges in input_statistics(model, get_blocks(model), SEGMENTS)]
    for block, old, new, weight in zip(get_blocks(model), before, after, weights, strict=True):
        limit = largest_reserved(old[None])
        outliers = old > limit
        assert outliers[OUTLIER]
        torch.testing.assert_close(new[outliers], (old[outliers] * limit).sqrt(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(new[~outliers], old[~outliers], rtol=1e-3, atol=1e-4)
        column = weight[:, OUTLIER] * (old[OUTLIER] / limit).sqrt()
        torch.testing.assert_close(block.self_attn.k_proj.weight[:, OUTLIER], column, rtol=1e-3, atol=1e-4)


def test_weight_quantizers_cover_the_weight_without_its_outliers(model) -> None:
    weight = get_blocks(model)[1].mlp.gate_proj.weight.clone()
    CoarseToFine(True, False, truncate="always").apply_(model, get_blocks(model), SEGMENTS)
    linear = get_blocks(model)[1].mlp.gate_proj
    assert torch.equal(linear.weight, weight), "what windows learn to reproduce keeps its outliers"
    limits = largest_reserved(weight.abs())
    assert limits[3:11].max() < 20
    clipped = weight.clamp(-limits[:, None], limits[:, None])
    scale = (clipped.amax(1).clamp_min(0) - clipped.amin(1).clamp_max(0)) / 15
    torch.testing.assert_close(linear.weight_quantizer.initial_scale.flatten(), scale)
    # Rounding the clipped weight is what rounding to nearest now does. A row that is cut off on both sides has its
    # zero point in the middle of two integers, where the last digit decides.
    zero_point = -clipped.amin(1).clamp_max(0) / scale
    compared = [row for row in range(128) if (zero_point[row] % 1 - 0.5).abs() > 1e-3]
    assert len(set(compared) & set(range(3, 11))) > 1
    assert len(compared) > 100
    nearest = linear.weight_quantizer(weight, linear.rounding)
    for row in compared:
        zero = round(zero_point[row].item())
        expected = torch.fake_quantize_per_tensor_affine(clipped[row], scale[row].item(), zero, 0, 15)
        torch.testing.assert_close(nearest[row], expected, rtol=1e-4, atol=1e-5)


def test_a_scaled_column_is_no_outlier_of_its_weight(model) -> None:
    """Weights are cut off by what they were before activations were scaled."""
    plain = [linear.weight.clone() for linear in quant_linears(get_blocks(model))]
    CoarseToFine(True, True, truncate="always").apply_(model, get_blocks(model), SEGMENTS)
    for weight, linear in zip(plain, quant_linears(get_blocks(model)), strict=True):
        clipped = weight.clamp(-(limit := largest_reserved(weight.abs())[:, None]), limit)
        factor = torch.where(weight == 0, torch.ones_like(weight), linear.weight / weight)
        expected = clipped * factor
        scale = (expected.amax(1).clamp_min(0) - expected.amin(1).clamp_max(0)) / 15
        torch.testing.assert_close(linear.weight_quantizer.initial_scale.flatten(), scale, rtol=1e-3, atol=1e-6)


def test_dead_channels_stay_finite(model) -> None:
    for block in get_blocks(model):
        block.post_attention_layernorm.weight.zero_()
        block.post_attention_layernorm.weight[0] = 1.0
    for relative_to in ("reserved", "largest"):
        CoarseToFine(True, True, relative_to=relative_to).apply_(model, get_blocks(model), SEGMENTS)
    assert all(linear.weight.isfinite().all() for linear in quant_linears(get_blocks(model)))
    assert model(SEGMENTS).logits.isfinite().all()


def test_full_precision_weights_have_no_quantizer_to_set(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).requires_grad_(False)
    quantize_linears_(get_blocks(model), QuantScheme(16, 4))
    CoarseToFine(True, True).apply_(model, get_blocks(model), SEGMENTS)
    assert all(isinstance(linear, QuantLinear) for linear in quant_linears(get_blocks(model)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserved": "fine"}, "preprocess.reserved must be one of all, coarse, got 'fine'"),
        ({"relative_to": "median"}, "preprocess.relative_to must be one of reserved, largest"),
        ({"lambda1": -1}, "preprocess.lambda1 must be a number of at least 0"),
        ({"lambda2": "a"}, "preprocess.lambda2 must be a number of at least 0"),
        ({"truncate": "never"}, "preprocess.truncate must be one of where_better, always, got 'never'"),
        ({"weights": 1}, "preprocess.weights must be true or false"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CoarseToFine(**({"weights": True, "activations": True} | options))


def initial_scales(model, **options) -> torch.Tensor:
    """Return every weight scale after preprocessing, in one vector."""
    model = copy.deepcopy(model)
    options = {"weights": True, "activations": True, "truncate": "always"} | options
    CoarseToFine(**options).apply_(model, get_blocks(model), SEGMENTS)
    return torch.cat([linear.weight_quantizer.initial_scale.flatten() for linear in quant_linears(get_blocks(model))])


@pytest.mark.parametrize("half", [{}, {"weights": False}, {"activations": False}], ids=str)
@pytest.mark.parametrize(
    "change", [{"reserved": "coarse"}, {"lambda1": 40.0}, {"lambda2": 1000.0}, {}], ids=lambda change: str(change)
)
def test_nothing_is_wired_to_nothing(model, half: dict, change: dict) -> None:
    """Each option changes the scales, in either half of the preprocessing; the same options do not."""
    assert torch.equal(initial_scales(model, **half, **change), initial_scales(model, **half)) == (not change)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_truncation_where_it_lessens_the_rounding_error(tiny_llama_folder: Path, bits: int) -> None:
    """Row by row, by torch's operator: the smaller of the two errors is kept; at 8 bits nearly all rows stay whole."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)
    weight = get_blocks(model)[1].mlp.gate_proj.weight
    weight[:, 7] *= torch.linspace(1, 12, len(weight))
    weight = weight.clone()
    quantize_linears_(get_blocks(model), QuantScheme(bits, 16))
    CoarseToFine(True, False).apply_(model, get_blocks(model), SEGMENTS)
    linear = get_blocks(model)[1].mlp.gate_proj
    levels, cut_off = 2**bits - 1, 0
    for row, limit, scale in zip(
        weight, largest_reserved(weight.abs()), linear.weight_quantizer.initial_scale.flatten(), strict=True
    ):
        errors, scales = [], []
        for kept in (row, row.clamp(-limit, limit)):
            low, high = min(kept.min().item(), 0.0), max(kept.max().item(), 0.0)
            scales.append((high - low) / levels)
            rounded = torch.fake_quantize_per_tensor_affine(kept, scales[-1], round(-low / scales[-1]), 0, levels)
            errors.append((rounded - row).square().sum().item())
        # Cut off on both sides, the zero point is in the middle of two integers, and the last digit decides.
        if abs(errors[1] - errors[0]) > 1e-3 * errors[0] and not (row.min() <= -limit and row.max() >= limit):
            assert scale.item() == pytest.approx(scales[errors[1] < errors[0]], rel=1e-5)
        cut_off += scale.item() < 0.999 * scales[0]
    assert cut_off > 10 if bits == 2 else cut_off < 10 or bits == 4


def test_halves_differ(model) -> None:
    both, weights, activations = (
        initial_scales(model, **half) for half in ({}, {"activations": False}, {"weights": False})
    )
    assert not torch.equal(both, weights)
    assert not torch.equal(both, activations)
    assert not torch.equal(weights, activations)
    assert not torch.equal(activations, initial_scales(model, weights=False, relative_to="largest"))


def test_eq_14_read_literally(model) -> None:
    """sqrt(max|X_i| / max(O*)) for every channel."""
    before = [ranges["mlp.gate_proj"].maxima for ranges in input_statistics(model, get_blocks(model), SEGMENTS)]
    for block in get_blocks(model):
        block.post_attention_layernorm.weight[9] *= 50
    scaled = [ranges["mlp.gate_proj"].maxima for ranges in input_statistics(model, get_blocks(model), SEGMENTS)]
    assert not torch.allclose(before[0], scaled[0])
    norm = get_blocks(model)[0].post_attention_layernorm.weight.clone()
    CoarseToFine(False, True, relative_to="largest").apply_(model, get_blocks(model), SEGMENTS)
    factor = norm / get_blocks(model)[0].post_attention_layernorm.weight
    torch.testing.assert_close(factor, (scaled[0] / scaled[0].max()).sqrt().clamp_min(0.01), rtol=1e-4, atol=1e-5)


def test_groups_are_cut_off_by_their_rows_limit(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).requires_grad_(False)
    linear = get_blocks(model)[2].mlp.up_proj
    linear.weight[4, 20] = 30.0
    limit = largest_reserved(linear.weight.abs())[4]
    quantize_linears_(get_blocks(model), QuantScheme(4, 16, group_size=16))
    CoarseToFine(True, False, truncate="always").apply_(model, get_blocks(model), SEGMENTS)
    group = get_blocks(model)[2].mlp.up_proj.weight[4, 16:32].clamp(-limit, limit)
    scale = get_blocks(model)[2].mlp.up_proj.weight_quantizer.initial_scale[4, 1]
    torch.testing.assert_close(scale.squeeze(), (group.max() - group.min().clamp_max(0)) / 15)
