"""What a weight's grid is learned by."""

import pytest
import torch

from cbq.quant.affine import choose_qparams_affine, to_groups
from cbq.quant.quantizer import WeightQuantizer
from cbq.quant.rounding import Nearest
from cbq.quant.step_size import ClippingFactors, ScaleMultiplier, SigmoidClipping

WEIGHT = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
CASES = [(2, -1, False), (3, 8, False), (4, -1, True), (2, 8, True)]


def make(kind: type, bits: int, group_size: int = -1, symmetric: bool = False) -> WeightQuantizer:
    quantizer = WeightQuantizer(WEIGHT, bits, group_size, symmetric)
    quantizer.step_size = kind(quantizer.initial_scale)
    return quantizer


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
@pytest.mark.parametrize("kind", [ScaleMultiplier, ClippingFactors])
def test_the_start_covers_the_whole_range(kind, bits, group_size, symmetric):
    scale, zero_point = make(kind, bits, group_size, symmetric).grid()
    expected = choose_qparams_affine(to_groups(WEIGHT, group_size), bits, symmetric)
    torch.testing.assert_close((scale, zero_point), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), CASES)
def test_factors_give_the_grid_of_the_clipped_weight(bits, group_size, symmetric):
    quantizer = make(ClippingFactors, bits, group_size, symmetric)
    torch.nn.init.constant_(quantizer.step_size.lower, 0.5)
    torch.nn.init.constant_(quantizer.step_size.upper, 0.8)
    groups = to_groups(WEIGHT, group_size)
    clipped = groups.clamp(groups.amin(-1, keepdim=True) * 0.5, groups.amax(-1, keepdim=True) * 0.8)
    torch.testing.assert_close(quantizer.grid(), choose_qparams_affine(clipped, bits, symmetric), rtol=1e-6, atol=0)


def test_factors_stay_between_almost_nothing_and_the_whole_range():
    quantizer = make(ClippingFactors, 4)
    whole = quantizer.scale
    torch.nn.init.constant_(quantizer.step_size.upper, 3.0)
    torch.nn.init.constant_(quantizer.step_size.lower, 3.0)
    assert torch.equal(quantizer.scale, whole)
    quantizer.scale.sum().backward()
    assert (quantizer.step_size.upper.grad > 0).all(), "not stuck where it starts"
    torch.nn.init.constant_(quantizer.step_size.upper, -1.0)
    assert (quantizer.scale > 0).all()


def test_sigmoid_clipping_starts_a_little_inside():
    start = torch.tensor(4.0).sigmoid()
    groups = to_groups(WEIGHT, -1)
    clipped = groups.clamp(groups.amin(-1, keepdim=True) * start, groups.amax(-1, keepdim=True) * start)
    expected = choose_qparams_affine(clipped, 3, False)
    torch.testing.assert_close(make(SigmoidClipping, 3).grid(), expected, rtol=1e-6, atol=0)


def test_gradients_at_the_ends_of_the_range():
    """What is cut off becomes the end of the range, a factor times the weight's own end: that is its gradient."""
    quantizer = make(ClippingFactors, 8)
    for factor in quantizer.step_size.parameters():
        torch.nn.init.constant_(factor, 0.5)
    low, high = WEIGHT.min(1), WEIGHT.max(1)
    values = quantizer(WEIGHT, Nearest(*WEIGHT.shape))
    torch.testing.assert_close(values.gather(1, high.indices[:, None]).flatten(), high.values / 2, rtol=0.01, atol=0)
    values.gather(1, high.indices[:, None]).sum().backward()
    torch.testing.assert_close(quantizer.step_size.upper.grad.flatten(), high.values, rtol=5e-3, atol=0)
    torch.testing.assert_close(quantizer.step_size.lower.grad.flatten(), torch.zeros(6), rtol=0, atol=0.02)
    quantizer.zero_grad()
    quantizer(WEIGHT, Nearest(*WEIGHT.shape)).gather(1, low.indices[:, None]).sum().backward()
    torch.testing.assert_close(quantizer.step_size.lower.grad.flatten(), low.values, rtol=5e-3, atol=0)


def test_a_range_that_follows_a_learned_weight():
    """The grid's gradient reaches the weight's own ends."""
    weight = WEIGHT.clone().requires_grad_()
    quantizer = make(ScaleMultiplier, 4)
    quantizer.follow_range_(2 * weight)
    assert torch.equal(quantizer.scale, choose_qparams_affine(2 * WEIGHT.unsqueeze(1), 4, False)[0])
    quantizer.scale.sum().backward()
    expected = torch.zeros_like(WEIGHT)
    expected.scatter_(1, WEIGHT.argmax(1, keepdim=True), 2 / 15).scatter_(1, WEIGHT.argmin(1, keepdim=True), -2 / 15)
    torch.testing.assert_close(weight.grad, expected)
