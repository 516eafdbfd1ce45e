"""Affine quantization against torch's own operators, finite differences, and properties of every input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbq.quant.affine import (
    choose_qparams_affine,
    dequantize_affine,
    fake_quantize_affine,
    quant_range,
    quantize_affine,
    round_ste,
    to_groups,
)

settings.register_profile("quick", max_examples=50, deadline=None)
settings.load_profile("quick")

VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=16).map(lambda v: torch.tensor([v]))
BITS = st.integers(2, 8)
# How a range is chosen: asymmetric, and symmetric with each denominator in use.
KINDS = st.sampled_from(["asymmetric", "half", "whole"])


def choose(values: torch.Tensor, bits: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    denominator = 2 ** (bits - 1) - 1 if kind == "whole" else None
    return choose_qparams_affine(values, bits, kind != "asymmetric", denominator)


def without_ties(scale: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Values inside and beyond every integer range of `bits` bits, never near the middle of two integers."""
    generator = torch.Generator().manual_seed(bits)
    whole = torch.randint(-(2**bits) - 4, 2**bits + 5, shape, generator=generator)
    return (whole + (torch.rand(shape, generator=generator) - 0.5) * 0.9) * scale


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_equals_torch_per_channel(bits):
    """Values and the gradient of x."""
    scale, zero_point = torch.tensor([0.01, 0.5, 3.0]), torch.tensor([0, 1, 2**bits - 1])
    x = without_ties(scale.unsqueeze(1), bits, (3, 200))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    quant_min, quant_max = quant_range(bits)
    actual = fake_quantize_affine(ours, scale.unsqueeze(1), zero_point.unsqueeze(1), quant_min, quant_max)
    expected = torch.fake_quantize_per_channel_affine(theirs, scale, zero_point.int(), 0, quant_min, quant_max)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    actual.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert 0 < (ours.grad == 0).sum() < ours.numel(), "some are clipped, some are not"


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_equals_torch_per_tensor(bits):
    x = without_ties(torch.tensor(0.3), bits, (50, 7))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual = fake_quantize_affine(ours, torch.tensor(0.3), torch.tensor(1.0), *quant_range(bits))
    expected = torch.fake_quantize_per_tensor_affine(theirs, 0.3, 1, *quant_range(bits))
    torch.testing.assert_close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_scale_gradient_equals_torch_learned_step_size():
    """Inside the range the gradient is that of learned step sizes (LSQ), which torch has as an operator."""
    x = without_ties(torch.tensor([[0.2], [0.7]]), 3, (2, 100))
    ours, theirs = torch.tensor([0.2, 0.7]).requires_grad_(), torch.tensor([0.2, 0.7]).requires_grad_()
    zero_point = torch.tensor([2.0, 5.0])
    upstream = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    fake_quantize_affine(x, ours.unsqueeze(1), zero_point.unsqueeze(1), 0, 7).backward(upstream)
    torch._fake_quantize_learnable_per_channel_affine(x, theirs, zero_point, 0, 0, 7, 1.0).backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("x", [-9.0, 9.0])
def test_scale_gradient_equals_finite_difference_where_clipped(x):
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    fake = lambda s: fake_quantize_affine(torch.tensor(x, dtype=torch.float64), s, torch.tensor(1.0), 0, 3)  # noqa: E731
    fake(scale).backward()
    with torch.no_grad():
        difference = (fake(scale + 1e-4) - fake(scale - 1e-4)) / 2e-4
    torch.testing.assert_close(scale.grad, difference)


def test_scale_gradient_by_hand():
    """x = 0.6, s = 0.5: x / s = 1.2 rounds to 1. d/ds of s round(x / s), straight through, is 1 - 1.2."""
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize_affine(torch.tensor(0.6), scale, torch.tensor(1.0), 0, 3).backward()
    assert scale.grad.item() == pytest.approx(-0.2)


def test_dequantize_is_differentiable_in_integers_and_scale():
    integers, scale = torch.tensor([0.0, 3.0], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    arguments = (integers.requires_grad_(), scale.requires_grad_(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(dequantize_affine, arguments)


def test_round_ste_is_torch_round_with_identity_gradient():
    x = torch.linspace(-3, 3, 25, requires_grad=True)  # ties included
    upstream = torch.arange(25.0)
    rounded = round_ste(x)
    rounded.backward(upstream)
    assert torch.equal(rounded, torch.round(x))
    assert torch.equal(x.grad, upstream)


@given(values=VALUES, bits=BITS, kind=KINDS)
def test_error_is_at_most_half_a_step(values, bits, kind):
    """The chosen range covers the values: nothing is clipped by more than rounding would cost."""
    scale, zero_point = choose(values, bits, kind)
    error = (fake_quantize_affine(values, scale, zero_point, *quant_range(bits)) - values).abs()
    assert (error <= scale * 0.501).all()


@given(values=VALUES, bits=BITS, kind=KINDS)
def test_integers_are_integers_in_range(values, bits, kind):
    scale, zero_point = choose(values, bits, kind)
    low, high = quant_range(bits)
    assert (low, high) == (0, 2**bits - 1)
    for integers in (quantize_affine(3 * values, scale, zero_point, low, high), zero_point):
        assert torch.equal(integers, integers.round())
        assert low <= integers.min() <= integers.max() <= high


@given(values=VALUES, bits=BITS, kind=KINDS)
def test_fake_quantization_is_idempotent_and_keeps_zero(values, bits, kind):
    scale, zero_point = choose(values, bits, kind)
    once = fake_quantize_affine(values, scale, zero_point, *quant_range(bits))
    assert torch.equal(fake_quantize_affine(once, scale, zero_point, *quant_range(bits)), once)
    assert fake_quantize_affine(torch.zeros(1), scale, zero_point, *quant_range(bits)).item() == 0.0


@given(values=VALUES, bits=BITS)
def test_asymmetric_range_is_the_smallest_around_zero(values, bits):
    scale, _ = choose_qparams_affine(values, bits, symmetric=False)
    numbers = [0.0, *values[0].tolist()]
    assert scale.item() == pytest.approx(max((max(numbers) - min(numbers)) / (2**bits - 1), 1e-9), rel=1e-5)


@pytest.mark.parametrize(("denominator", "expected"), [(None, 3 / 7.5), (7.5, 3 / 7.5), (7, 3 / 7)])
def test_symmetric_denominators(denominator, expected):
    scale, zero_point = choose_qparams_affine(torch.tensor([[1.0, -3.0], [3.0, 0.0]]), 4, True, denominator)
    assert scale.flatten().tolist() == pytest.approx([expected] * 2)
    assert zero_point.flatten().tolist() == [8.0, 8.0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("constant", [0.0, 1.0, -1.0, 250.0, -3e-5, 1e-30, -1e-30])
def test_constant_group_is_finite_and_close(constant, bits, symmetric):
    """Also a group whose range is far below the smallest scale."""
    values = torch.full((1, 4), constant)
    scale, zero_point = choose_qparams_affine(values, bits, symmetric)
    back = fake_quantize_affine(values, scale, zero_point, *quant_range(bits))
    assert math.isfinite(scale.item())
    assert scale.item() > 0
    assert back.isfinite().all()
    if symmetric or abs(constant) < 1e-9:
        assert (back - values).abs().max() <= scale * 0.501
    else:
        torch.testing.assert_close(back, values)  # an end of the range is an integer


def test_qparams_are_float32_for_bfloat16():
    scale, zero_point = choose_qparams_affine(torch.randn(3, 8).bfloat16(), 4, False)
    assert scale.dtype == zero_point.dtype == torch.float32
    assert scale.shape == zero_point.shape == (3, 1)


@pytest.mark.parametrize(("group_size", "groups"), [(-1, 1), (6, 1), (3, 2), (1, 6)])
def test_to_groups_cuts_rows_in_order(group_size, groups):
    weight = torch.arange(12.0).view(2, 6)
    cut = to_groups(weight, group_size)
    assert cut.shape == (2, groups, 6 // groups)
    assert cut.tolist() == [[row[i : i + 6 // groups] for i in range(0, 6, 6 // groups)] for row in weight.tolist()]
