"""Second derivatives against finite differences and against torch's own, on a plain model changed by hand."""

import copy

import pytest
import torch
from analysis.conftest import loss_of, nearest
from torch.func import functional_call
from torch.func import hessian as torch_hessian
from torch.nn.attention import SDPBackend, sdpa_kernel

from cbq.analysis.curvature import frozen_rounding, scale_hessian, weight_hessian
from cbq.analysis.schemes import named_linears
from cbq.quant.linear import quant_linears
from cbq.quant.scheme import QuantScheme

H = 1e-3


def differences(loss, size: int) -> torch.Tensor:
    """Central differences of a function of a point (size,) at 0, (size, size)."""
    steps = torch.eye(size, dtype=torch.float64) * H
    found = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            a, b = steps[i], steps[j]
            found[i, j] = (loss(a + b) - loss(a - b) - loss(b - a) + loss(-a - b)) / (4 * H * H)
    return found


@pytest.fixture
def rounded(make_pair):
    """A pair in float64 whose plain model has 3-bit weights, rounded by a textbook's formula."""

    def make(act_bits: int):
        pair = make_pair(QuantScheme(3, act_bits), dtype=torch.float64)
        for linear in pair.linears(pair.plain).values():
            linear.weight.data = nearest(linear.weight, 3)
        return pair

    return make


def scaled_loss(pair, offsets: torch.Tensor) -> float:
    """The plain model's loss with all weights of block k times 1 + offsets[k]."""
    model = copy.deepcopy(pair.plain)
    for name, linear in pair.linears(model).items():
        linear.weight.data *= 1 + offsets[int(name.split(".")[1])]
    return loss_of(model, pair.segments)


def test_scales_against_finite_differences(rounded):
    pair = rounded(act_bits=16)
    found = scale_hessian(pair.loaded.model, pair.loaded.blocks, pair.segments)
    expected = differences(lambda offsets: scaled_loss(pair, offsets), 3)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_scales_with_quantized_activations_against_differences_with_constant_errors(rounded):
    """What is rounded off each activation at the point is a number that is added everywhere around it."""
    pair = rounded(act_bits=4)
    errors, quantizers = [], [linear.act_quantizer for linear in quant_linears(pair.loaded.blocks)]

    def record(quantizer):
        def hook(linear, args):
            errors.append(quantizer.nearest(args[0]) - args[0])
            return (args[0] + errors[-1],)

        return hook

    def replay(linear, args):
        return (args[0] + next(waiting),)

    linears = pair.linears(pair.plain).values()
    hooks = [linear.register_forward_pre_hook(record(q)) for linear, q in zip(linears, quantizers, strict=True)]
    scaled_loss(pair, torch.zeros(3))
    for hook in hooks:
        hook.remove()
    for linear in linears:
        linear.register_forward_pre_hook(replay)

    def loss(offsets):
        nonlocal waiting
        waiting = iter(errors)
        return scaled_loss(pair, offsets)

    waiting = iter(())
    expected = differences(loss, 3)
    found = scale_hessian(pair.loaded.model, pair.loaded.blocks, pair.segments)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    without = rounded(act_bits=16)
    assert not torch.allclose(
        found, scale_hessian(without.loaded.model, without.loaded.blocks, pair.segments), rtol=1e-2
    )


@pytest.mark.parametrize("name", ["blocks.0.self_attn.q_proj", "blocks.2.fc2"])
def test_weights_against_the_whole_hessian_of_torch(rounded, name):
    pair = rounded(act_bits=16)
    key = name.replace("blocks", "model.decoder.layers") + ".weight"

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pair.plain

        def forward(self):
            return loss_of(self.inner, pair.segments)

    weight = pair.plain.get_parameter(key).data
    with sdpa_kernel(SDPBackend.MATH):
        whole = torch_hessian(lambda w: functional_call(Loss(), {f"inner.{key}": w}, ()))(weight)  # (O, I, O, I)
    rows, columns = [1, 4, 6], [0, 3]
    expected = whole[rows][:, columns][:, :, rows][:, :, :, columns].reshape(6, 6)
    linear = named_linears(pair.loaded.blocks)[name]
    found = weight_hessian(pair.loaded.model, pair.loaded.blocks, linear, rows, columns, pair.segments)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_everything_is_put_back(make_pair):
    pair = make_pair(QuantScheme(2, 8))
    linears = quant_linears(pair.loaded.blocks)
    weights = [linear.weight for linear in linears]
    with frozen_rounding(pair.loaded.blocks):
        assert not any(linear.weight is weight for linear, weight in zip(linears, weights, strict=True))
    assert all(linear.weight is weight for linear, weight in zip(linears, weights, strict=True))
    assert not any(linear._forward_pre_hooks or linear._forward_hooks for linear in linears)
