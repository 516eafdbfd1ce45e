"""The quantizers against loops over single numbers."""

import numpy as np
import pytest
import torch

from cbq.errors import InputError
from cbq.quant.quantizer import ActQuantizer, WeightQuantizer, gradients_through_ranges
from cbq.quant.rounding import Nearest


def quantize_by_hand(numbers: np.ndarray, bits: int, symmetric: bool) -> tuple[np.float32, int, list[np.float32]]:
    """Return the scale, zero point and dequantized values of one group or token, one float32 number at a time."""
    top = 2**bits - 1
    if symmetric:
        scale, zero_point = max(abs(number) for number in numbers) / np.float32(top / 2), 2 ** (bits - 1)
    else:
        lowest, highest = min(0, *numbers), max(0, *numbers)
        scale = np.float32(highest - lowest) / np.float32(top)
        zero_point = round(-lowest / scale)
    return scale, zero_point, [(min(max(round(n / scale) + zero_point, 0), top) - zero_point) * scale for n in numbers]


def random_tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 12, 4, 3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_groups_equal_loops(bits, group_size, symmetric):
    weight = random_tensor(5, 12)
    quantizer = WeightQuantizer(weight, bits, group_size, symmetric)
    size = 12 if group_size == -1 else group_size
    scales, zero_points, values = np.zeros((5, 12 // size)), np.zeros((5, 12 // size)), np.zeros((5, 12))
    for row in range(5):
        for group in range(12 // size):
            place = slice(group * size, (group + 1) * size)
            hand = quantize_by_hand(weight[row, place].numpy(), bits, symmetric)
            scales[row, group], zero_points[row, group], values[row, place] = hand
    np.testing.assert_allclose(quantizer.scale.squeeze(-1).detach(), scales, rtol=1e-6)
    np.testing.assert_array_equal(quantizer.zero_point.squeeze(-1), zero_points)
    np.testing.assert_allclose(quantizer.nearest(weight), values, rtol=1e-6)
    np.testing.assert_allclose(quantizer(weight, Nearest(5, 12)).detach(), values, rtol=1e-6)


@pytest.mark.parametrize("group_size", [5, 7, 24])
def test_group_size_must_divide(group_size):
    with pytest.raises(InputError, match=rf"quant\.group_size .*12.*{group_size}"):
        WeightQuantizer(torch.zeros(2, 12), 4, group_size)


def test_multiplier_scales_the_grid_of_its_group_only():
    weight = random_tensor(2, 8)
    quantizer, plain = WeightQuantizer(weight, 3, 4), WeightQuantizer(weight, 3, 4)
    with torch.no_grad():
        quantizer.step_size.multiplier[1, 0] = 1.5
    values, before = quantizer(weight, Nearest(2, 8)), plain(weight, Nearest(2, 8))
    steps = values[1, :4] / (1.5 * plain.initial_scale[1, 0])
    torch.testing.assert_close(steps, steps.round())
    assert not torch.allclose(values[1, :4], before[1, :4])
    assert torch.equal(values[0], before[0])
    assert torch.equal(values[1, 4:], before[1, 4:])
    assert torch.equal(quantizer.nearest(weight), before), "round-to-nearest stays at the initial scale"


def test_multiplier_below_the_smallest_still_gives_a_positive_scale():
    quantizer = WeightQuantizer(random_tensor(2, 8), 4)
    with torch.no_grad():
        quantizer.step_size.multiplier.fill_(-1.0)
    assert (quantizer.scale > 0).all()


def test_weight_multiplier_gets_a_gradient_in_every_group():
    weight = random_tensor(3, 8)
    quantizer = WeightQuantizer(weight, 2, 4)
    (quantizer(weight, Nearest(3, 8)) - weight).square().sum().backward()
    assert (quantizer.step_size.multiplier.grad != 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_tokens_equal_loops(bits, symmetric):
    x = random_tensor(2, 3, 6) * torch.tensor([0.01, 1.0, 300.0]).view(1, 3, 1)
    expected = [[quantize_by_hand(token, bits, symmetric)[2] for token in batch] for batch in x.numpy()]
    quantizer = ActQuantizer(bits, symmetric)
    np.testing.assert_allclose(quantizer(x).detach(), expected, rtol=1e-6)
    np.testing.assert_allclose(quantizer.nearest(x), expected, rtol=1e-6)


def test_denominator_reaches_the_tokens():
    x = torch.tensor([[7.0, -3.2]])
    assert ActQuantizer(4, True, 7)(x).tolist() == [[7.0, -3.0]]
    np.testing.assert_allclose(ActQuantizer(4, True, 7.5)(x).detach().numpy(), [[7 * 14 / 15, -3 * 14 / 15]], rtol=1e-6)


def test_act_multiplier_scales_every_tokens_grid():
    x = random_tensor(4, 32)
    quantizer = ActQuantizer(4)
    before = quantizer(x)
    with torch.no_grad():
        quantizer.range_multiplier.fill_(0.5)
    scale = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    steps = quantizer(x) / (0.5 * scale)
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    assert steps.max() - steps.min() <= 15 + 4, "the range is halved, so that the ends are clipped"
    assert quantizer(x).abs().max() < before.abs().max()
    assert torch.equal(quantizer.nearest(x), before)


@pytest.mark.parametrize("symmetric", [False, True])
def test_act_gradients(symmetric):
    x = random_tensor(4, 16).requires_grad_()
    quantizer = ActQuantizer(4, symmetric)
    (quantizer(x) * random_tensor(4, 16)).sum().backward()
    assert quantizer.range_multiplier.grad.item() != 0
    assert (x.grad != 0).any(-1).all(), "every token gets a gradient"


@pytest.mark.parametrize("through_ranges", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_through_the_range_of_each_token(symmetric, through_ranges):
    """As of the same formulas in plain torch, with the ends of the range held fixed or not."""
    x, weight = random_tensor(5, 16).requires_grad_(), random_tensor(5, 16)
    quantizer = ActQuantizer(4, symmetric)
    with gradients_through_ranges([quantizer], through_ranges):
        (quantizer(x) * weight).sum().backward()
    assert quantizer.range_gradient is False, "as before"

    plain = x.detach().clone().requires_grad_()
    ends = plain if through_ranges else plain.detach()
    low, high = ends.min(-1, keepdim=True).values, ends.max(-1, keepdim=True).values
    scale = torch.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    zero_point = 8.0 if symmetric else (-low / scale).detach().round()
    steps = plain / scale
    integers = (steps + (steps.round() - steps).detach() + zero_point).clamp(0, 15)
    ((integers - zero_point) * scale * weight).sum().backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_kept(dtype):
    assert ActQuantizer(8)(random_tensor(2, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize("through_ranges", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_token_stays_zero(dtype, symmetric, through_ranges):
    x = random_tensor(3, 8).to(dtype)
    x[1] = 0
    x.requires_grad_()
    quantizer = ActQuantizer(4, symmetric)
    with gradients_through_ranges([quantizer], through_ranges):
        output = quantizer(x)
    output.sum().backward()
    assert (output[1] == 0).all()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()
    assert quantizer.range_multiplier.grad.isfinite()
