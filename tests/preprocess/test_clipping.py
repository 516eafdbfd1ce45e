"""Ranges that leave something out, against searches written out one number at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.models.loading import load_pretrained
from cbq.preprocess.clipping import (
    RATIOS,
    Clipping,
    Percentile,
    SmallestError,
    clip_for_outputs,
    clip_for_weights,
)
from cbq.quant.linear import quant_linears
from cbq.quant.quantizer import ActQuantizer, StaticActQuantizer, WeightQuantizer
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_

SEGMENTS = torch.randint(320, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def weight() -> torch.Tensor:
    """12 rows of 64, heavy-tailed."""
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(1)).pow(3)


def rounded(row: torch.Tensor, ratio: float, bits: int) -> torch.Tensor:
    """Return a row cut off at a share of its range and rounded, by torch's operator."""
    low, high = min(row.min().item(), 0.0) * ratio, max(row.max().item(), 0.0) * ratio
    scale = (high - low) / (2**bits - 1)
    return torch.fake_quantize_per_tensor_affine(row, scale, round(-low / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("of_outputs", [False, True])
def test_search_equals_trying_everything(weight, group_size, bits, of_outputs):
    """Ratios whose errors are equal but for the last digits may differ: errors are compared."""
    sample = torch.randn(90, 64, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 5, 64)
    quantizer = WeightQuantizer(weight, bits, group_size)
    clipped = clip_for_outputs(quantizer, weight, sample) if of_outputs else clip_for_weights(quantizer, weight)
    size = 64 if group_size == -1 else group_size
    smaller = 0
    for number, (row, cut) in enumerate(zip(weight.view(-1, size), clipped.view(-1, size), strict=True)):
        group = number % (64 // size)
        x = sample[:, group * size : (group + 1) * size] if of_outputs else torch.eye(size)
        errors = [(x @ (rounded(row, ratio, bits) - row)).square().sum().item() for ratio in RATIOS]
        best = RATIOS[int(np.argmin(errors))]
        found = (x @ (rounded(cut, 1.0, bits) - row)).square().sum().item()
        assert found == pytest.approx(min(errors), rel=1e-3)
        assert found <= errors[0] * (1 + 1e-4)
        smaller += best < 1
    assert smaller > 2, "heavy tails are worth cutting off"


@pytest.mark.parametrize("make", [ActQuantizer, StaticActQuantizer])
def test_omse_ratio_of_activations(make):
    sample = torch.randn(30, 64, generator=torch.Generator().manual_seed(3)).pow(3)
    quantizer = make(3)
    quantizer.set_range_(sample.amin(), sample.amax())

    def error(ratio: float) -> float:
        if make is ActQuantizer:
            return torch.stack([(rounded_around(row, ratio) - row).square().mean() for row in sample]).mean().item()
        return (rounded_around(sample, ratio) - sample).square().mean().item()

    def rounded_around(x: torch.Tensor, ratio: float) -> torch.Tensor:
        low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
        scale = (high - low) / 7
        return torch.fake_quantize_per_tensor_affine(x, scale * ratio, round(-low / scale), 0, 7)

    errors = [error(ratio) for ratio in RATIOS]
    assert SmallestError().ratio(quantizer, sample) == RATIOS[int(np.argmin(errors))] < 1


def test_percentile_is_numpys(weight):
    method = Percentile(90.0)
    limits = np.percentile(weight.abs().numpy(), 90.0, axis=1)
    expected = np.clip(weight.numpy(), -limits[:, None], limits[:, None])
    np.testing.assert_allclose(method.clip(WeightQuantizer(weight, 4), weight).numpy(), expected, rtol=1e-5)
    sample = torch.cat([weight, torch.zeros(1, 64)])
    shares = limits / weight.abs().numpy().max(1)
    assert method.ratio(ActQuantizer(4), sample) == pytest.approx(shares.mean(), rel=1e-5), (
        "a row of zeros says nothing"
    )
    assert method.ratio(ActQuantizer(4), torch.zeros(3, 64)) == 1, "nor do many: the mean of none is no number"


@pytest.fixture
def loaded(tiny_llama_folder: Path):
    return load_pretrained(str(tiny_llama_folder))


def scales_and_ratios(loaded) -> tuple[torch.Tensor, torch.Tensor]:
    linears = quant_linears(loaded.blocks)
    scales = torch.cat([linear.weight_quantizer.initial_scale.flatten() for linear in linears])
    return scales, torch.stack([linear.act_quantizer.clip_ratio for linear in linears])


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("method", [SmallestError, Percentile])
@pytest.mark.parametrize(("weights", "activations"), [(True, False), (False, True)])
def test_each_half_does_its_own(loaded, method: type[Clipping], weights, activations, granularity):
    make_quantizable_(loaded.model, loaded.blocks, QuantScheme(3, 4, act_granularity=granularity))
    scales, ratios = scales_and_ratios(loaded)
    plain = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
    options = {"percentile": 95.0} if method is Percentile else {}
    method(weights=weights, activations=activations, **options).apply_(loaded.model, loaded.blocks, SEGMENTS)
    after_scales, after_ratios = scales_and_ratios(loaded)
    assert torch.equal(scales, after_scales) == (not weights)
    assert (after_scales <= scales * 1.0001).all()
    assert torch.equal(ratios, after_ratios) == (not activations)
    assert ((after_ratios > 0.2) & (after_ratios <= 1)).all()
    assert all(torch.equal(weight, plain[name]) for name, weight in loaded.model.named_parameters())


def test_the_whole_range_is_nothing(loaded):
    make_quantizable_(loaded.model, loaded.blocks, QuantScheme(3, 4))
    scales, _ = scales_and_ratios(loaded)
    Percentile(100).apply_(loaded.model, get_blocks(loaded.model), SEGMENTS)
    after, ratios = scales_and_ratios(loaded)
    # A row with values on both sides is cut at its largest |w|, which cuts nothing.
    torch.testing.assert_close(after, scales)
    assert (ratios == 1).all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SmallestError, {"weights": 1}, "preprocess.weights must be true or false"),
        (SmallestError, {"activations": "no"}, "preprocess.activations must be true or false"),
        *[(Percentile, {"percentile": value}, "preprocess.percentile") for value in (49, 101, True, "99", None)],
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(InputError, match=message):
        method(**options)
