"""GPTQ against its definition: each column is rounded after those left have answered best to those already rounded."""

import pytest
import torch
from torch import nn

from cbq.errors import InputError
from cbq.quant.linear import QuantLinear
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.losses import ReconstructionLoss

DEAD = 5


def make_case(scheme: QuantScheme, dead: bool = False) -> tuple[QuantLinear, torch.Tensor]:
    """Return a linear (10, 24) and the Gram matrix of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(24, 10)
    linear.weight.data = torch.randn(10, 24, generator=generator)
    mixing = torch.randn(24, 24, generator=generator) * torch.rand(24, generator=generator).exp()
    x = torch.randn(200, 24, generator=generator) @ mixing + torch.randn(24, generator=generator)
    if dead:
        x[:, DEAD] = 0
    return QuantLinear(linear, scheme), (x.T @ x).double()


def elements(linear: QuantLinear) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale and the zero point of each element of a linear's weight."""
    quantizer = linear.weight_quantizer
    group = torch.arange(linear.in_features) * quantizer.scale.shape[1] // linear.in_features
    return quantizer.scale.double().squeeze(-1)[:, group], quantizer.zero_point.double().squeeze(-1)[:, group]


def round_columns(linear: QuantLinear, gram: torch.Tensor, order: list[int], damping: float) -> torch.Tensor:
    """Return integers by solving, before each column is rounded, for the best values of all columns left.

    With what is rounded changed by C_F, the change of the rest that minimizes tr(C H C^T) is - C_F H_FR H_RR^-1.
    """
    weight, (scale, zero_point) = linear.weight.double(), elements(linear)
    highest = 2**linear.scheme.weight_bits - 1
    alive = gram.diagonal() > 0
    gram = gram + damping * gram.diagonal()[alive].mean() * torch.eye(len(gram), dtype=torch.float64)
    integers, change = torch.zeros_like(weight), torch.zeros_like(weight)
    for position, column in enumerate(order):
        done, left = order[:position], order[position:]
        answer = -torch.linalg.solve(gram[left][:, left], (change[:, done] @ gram[done][:, left]).T).T
        wanted = weight[:, column] + answer[:, 0]
        integers[:, column] = (torch.round(wanted / scale[:, column]) + zero_point[:, column]).clamp(0, highest)
        change[:, column] = (integers[:, column] - zero_point[:, column]) * scale[:, column] - weight[:, column]
    return integers


def output_error(linear: QuantLinear, gram: torch.Tensor, integers: torch.Tensor) -> float:
    scale, zero_point = elements(linear)
    change = (integers - zero_point) * scale - linear.weight.double()
    return torch.trace(change @ gram @ change.T).item()


SCHEMES = [
    QuantScheme(2, 16),
    QuantScheme(3, 16, 8),
    QuantScheme(4, 16, 6, True),
    QuantScheme(4, 16, -1, True),
    QuantScheme(8, 16, 12),
]


def label(scheme: QuantScheme) -> str:
    return f"{scheme.label}{'-symmetric' if scheme.symmetric else ''}"


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("dead", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_integers_are_those_of_the_definition(scheme, act_order, dead):
    linear, gram = make_case(scheme, dead)
    kept = gram.clone()
    GPTQ(ReconstructionLoss(), damping=0.01, act_order=act_order, block_size=7).solve_linear_(linear, gram)
    assert torch.equal(gram, kept)
    order = sorted(range(24), key=lambda column: -gram[column, column].item()) if act_order else list(range(24))
    expected = round_columns(linear, gram, order, damping=0.01)
    assert torch.equal(linear.integers().double(), expected)
    assert (linear.integers() != linear.weight_quantizer.starting_integers(linear.weight).flatten(1)).any()


def test_order_damping_and_errors_matter():
    """So that the test above can fail."""
    linear, gram = make_case(QuantScheme(3, 16, 8))
    order = sorted(range(24), key=lambda column: -gram[column, column].item())
    found = round_columns(linear, gram, order, 0.01)
    assert not torch.equal(found, round_columns(linear, gram, list(range(24)), 0.01))
    assert not torch.equal(found, round_columns(linear, gram, order, 1.0))


@pytest.mark.parametrize("block_size", [1, 5, 24, 1000])
def test_block_size_changes_nothing(block_size):
    (linear, gram), (other, _) = make_case(QuantScheme(3, 16, 8)), make_case(QuantScheme(3, 16, 8))
    GPTQ(ReconstructionLoss(), block_size=24).solve_linear_(linear, gram)
    GPTQ(ReconstructionLoss(), block_size=block_size).solve_linear_(other, gram)
    assert torch.equal(linear.integers(), other.integers())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES, ids=label)
def test_outputs_change_less_than_by_rounding_to_nearest(scheme, act_order):
    linear, gram = make_case(scheme)
    nearest = linear.weight_quantizer.starting_integers(linear.weight).flatten(1)
    GPTQ(ReconstructionLoss(), act_order=act_order).solve_linear_(linear, gram)
    found = output_error(linear, gram, linear.integers())
    assert found < 0.8 * output_error(linear, gram, nearest)


def test_uncorrelated_inputs_are_rounded_to_nearest():
    linear, gram = make_case(QuantScheme(3, 16, 8))
    GPTQ(ReconstructionLoss()).solve_linear_(linear, gram.diagonal().diag())
    assert linear.changed_integers() == (0, 240)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_columns_that_are_always_zero_are_rounded_to_nearest(damping):
    linear, gram = make_case(QuantScheme(3, 16), dead=True)
    GPTQ(ReconstructionLoss(), damping).solve_linear_(linear, gram)
    nearest = linear.weight_quantizer.starting_integers(linear.weight).flatten(1)
    assert torch.equal(linear.integers()[:, DEAD], nearest[:, DEAD].to(torch.uint8))
    GPTQ(ReconstructionLoss(), damping).solve_linear_(linear, torch.zeros_like(gram))
    assert torch.equal(linear.integers(), nearest.to(torch.uint8))


def test_grid_is_that_of_the_quantizer():
    """A smaller range, as preprocessing sets it, stays; the weight and the step sizes are not touched."""
    linear, gram = make_case(QuantScheme(3, 16))
    linear.weight_quantizer.set_range_(linear.weight * 0.6)
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    GPTQ(ReconstructionLoss()).solve_linear_(linear, gram)
    after = linear.state_dict()
    assert set(after) - set(before) == {"rounding.values", "rounding.steps"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    order = sorted(range(24), key=lambda column: -gram[column, column].item())
    assert torch.equal(linear.integers().double(), round_columns(linear, gram, order, damping=0.01))
    linear.state = QuantState.LEARNED
    scale, zero_point = elements(linear)
    weight = ((linear.integers() - zero_point) * scale).float()
    torch.testing.assert_close(linear(torch.eye(24)) - linear.bias, weight.T)


def test_too_little_damping_says_so():
    linear, _ = make_case(QuantScheme(3, 16))
    x = torch.ones(3, 24, dtype=torch.float64)
    with pytest.raises(InputError, match=r"^reconstruction\.damping must be larger"):
        GPTQ(ReconstructionLoss(), damping=0.0).solve_linear_(linear, x.T @ x)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("damping", value) for value in (-0.01, "1", None, True, float("nan"), float("inf"))],
        *[("act_order", value) for value in ("yes", 1, None)],
        *[("block_size", value) for value in (0, -1, 1.5, 128.0, True, "2", None)],
    ],
    ids=repr,
)
def test_values_out_of_range(key, value):
    with pytest.raises(InputError, match=rf"^reconstruction\.{key} "):
        GPTQ(ReconstructionLoss(), **{key: value})
