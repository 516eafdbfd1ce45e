"""Integers that were computed elsewhere reach the linear as they are."""

import pytest
import torch
from torch import nn

from cbq.quant.given_integers import GivenIntegers
from cbq.quant.linear import QuantLinear, fuse
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState

LABELS = ["per channel", "groups", "symmetric"]


@pytest.mark.parametrize(
    "scheme", [QuantScheme(2, 16), QuantScheme(8, 16, 4), QuantScheme(4, 16, -1, True)], ids=LABELS
)
def test_integers_are_those_given(scheme):
    generator = torch.Generator().manual_seed(0)
    linear = QuantLinear(nn.Linear(8, 6), scheme)
    integers = torch.randint(2**scheme.weight_bits, (6, 8), generator=generator)
    quantizer = linear.weight_quantizer
    group = torch.arange(8) // (scheme.group_size if scheme.group_size > 0 else 8)
    scale, zero_point = quantizer.scale.squeeze(-1)[:, group], quantizer.zero_point.squeeze(-1)[:, group]
    linear.rounding = GivenIntegers(integers - zero_point)
    linear.state = QuantState.LEARNED
    assert torch.equal(linear.integers(), integers.to(torch.uint8))
    x = torch.randn(3, 8, generator=generator)
    expected = x @ ((integers - zero_point) * scale).T + linear.bias
    torch.testing.assert_close(linear(x), expected)
    assert torch.equal(fuse(linear)(x), linear(x))
    rounded = ((linear.weight / scale).round() + zero_point).clamp(0, 2**scheme.weight_bits - 1)
    assert linear.changed_integers() == (int((rounded != integers).sum()), 48)


def test_there_is_nothing_to_learn_and_the_scale_does_not_matter():
    rounding = GivenIntegers(torch.tensor([[-255.0, 0.0, 255.0]]))
    assert list(rounding.parameters()) == []
    assert rounding.learning_rate == 0
    groups = torch.randn(1, 3, 1)
    for scale in (0.1, 7.0):
        values = rounding(groups, torch.ones(1, 3, 1), torch.full((1, 3, 1), scale))
        assert values.tolist() == [[[-255.0], [0.0], [255.0]]]
