"""Rounding learned linear by linear: the loss is the outputs' error, and it gets smaller."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from cbq.errors import InputError
from cbq.quant.linear import QuantLinear
from cbq.quant.rounding import AdaRound, DenseSTE, LoRARounding, LoRASTE, Nearest
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState
from cbq.reconstruction.linear_adaround import LinearAdaRound, output_error
from cbq.reconstruction.losses import ReconstructionLoss

LABELS = ["per channel", "groups", "symmetric"]


@pytest.fixture
def inputs() -> torch.Tensor:
    """200 correlated inputs (200, 24)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator) + 0.5


def make_linear(scheme: QuantScheme, size: float = 1.0) -> QuantLinear:
    linear = nn.Linear(24, 10)
    linear.weight.data = torch.randn(10, 24, generator=torch.Generator().manual_seed(1)) * size
    return QuantLinear(linear, scheme)


def solved(scheme: QuantScheme, x: torch.Tensor, size: float = 1.0, kind: type = AdaRound, **options) -> QuantLinear:
    """Return a linear after LinearAdaRound."""
    options = {"num_steps": 150} | options
    linear = make_linear(scheme, size)
    solver = LinearAdaRound(ReconstructionLoss(), kind, **options)
    with torch.no_grad():
        solver.solve_linear_(linear, (x.T @ x).double())
    return linear


def mean_squared_error(linear: QuantLinear, x: torch.Tensor, state: QuantState) -> float:
    """Return that of the linear's outputs for inputs x, in `state`, by its plain forward."""
    exact = linear(x)
    linear.state = state
    error = (linear(x) - exact).square().mean().item()
    linear.state = QuantState.FULL_PRECISION
    return error


def test_loss_is_the_error_of_the_outputs(inputs):
    generator = torch.Generator().manual_seed(2)
    change = torch.randn(10, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    x = inputs.double()
    loss = output_error(change, x.T @ x)
    expected = (x @ change.T).square().sum(0)
    torch.testing.assert_close(loss, expected)
    weights = torch.rand(10, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad((loss * weights).sum(), change)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), change)
    torch.testing.assert_close(found, gradient)


class Watcher(LinearAdaRound):
    """Learns nothing, and keeps what it would learn from."""

    def _learn_(self, rounding, quantizer, weight, gram, shares) -> None:
        nearest = quantizer(weight, Nearest(*reversed(weight.shape)))
        self.losses = output_error(nearest - weight, gram) * shares


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_loss_of_round_to_nearest_is_one(inputs, size, bits):
    """Whatever the sizes of weights and inputs, and the bits: what is learned from starts as a share of it."""
    linear, x = make_linear(QuantScheme(bits, 16), size), inputs * size
    linear.weight.data[3] *= 20
    solver = Watcher(ReconstructionLoss(), AdaRound)
    with torch.no_grad():
        solver.solve_linear_(linear, (x.T @ x).double())
    torch.testing.assert_close(solver.losses, torch.ones(10), rtol=1e-3, atol=0)


def test_an_output_is_learned_as_if_it_were_alone(inputs):
    """However much larger another one is: outliers must not keep it from being learned, or from ending hard."""
    several = make_linear(QuantScheme(2, 16))
    several.weight.data[3] *= 20
    several.weight_quantizer.set_range_(several.weight)
    alone = copy.deepcopy(several)
    alone.weight.data[3] /= 20
    alone.weight_quantizer.set_range_(alone.weight)
    solver = LinearAdaRound(ReconstructionLoss(), AdaRound, num_steps=400)
    with torch.no_grad():
        for linear in (several, alone):
            solver.solve_linear_(linear, (inputs.T @ inputs).double())
    assert solver.notes == []
    assert (several.integers() == alone.integers()).float().mean() > 0.98


def output_errors(linear: QuantLinear, x: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Return the squared error of each output for inputs x, (O,), float64, by plain products."""
    linear.state = state
    product = linear(x).double()
    linear.state = QuantState.FULL_PRECISION
    return (product - linear(x).double()).square().sum(0)


@pytest.mark.parametrize("kind", [AdaRound, DenseSTE, LoRARounding, LoRASTE])
@pytest.mark.parametrize(
    "scheme", [QuantScheme(2, 16), QuantScheme(3, 16, 8), QuantScheme(4, 16, -1, True)], ids=LABELS
)
def test_outputs_change_less_than_by_rounding_to_nearest(inputs, scheme, kind):
    """Few steps and a low rank leave most values between two integers: a large weight would pick ends at random."""
    torch.manual_seed(0)  # the start of A1
    options = {"kind": partial(kind, learning_rate=1e-1), "compensation_weight": 1.0} if kind is LoRARounding else {}
    linear = solved(scheme, inputs, **({"kind": kind} | options))
    found, nearest = (mean_squared_error(linear, inputs, s) for s in (QuantState.LEARNED, QuantState.NEAREST))
    assert found < (0.7 if kind is AdaRound else 0.95) * nearest


@pytest.mark.parametrize("kind", [AdaRound, LoRARounding, LoRASTE])
def test_no_output_is_worse_than_rounded_to_nearest(inputs, kind):
    """However few steps: and those that are better keep what they learned."""
    torch.manual_seed(0)  # the start of A1
    kind, x = partial(kind, learning_rate=1.0), inputs * torch.tensor([30.0] + [1.0] * 23)
    linear = make_linear(QuantScheme(2, 16))
    solver = LinearAdaRound(ReconstructionLoss(), kind, num_steps=10)
    with torch.no_grad():
        solver.solve_linear_(linear, (x.T @ x).double())
        learned, nearest = (output_errors(linear, x, state) for state in (QuantState.LEARNED, QuantState.NEAREST))
    assert (learned <= nearest * (1 + 1e-4)).all()
    assert (learned < 0.99 * nearest).any()
    assert len(solver.notes) == (learned >= nearest * (1 - 1e-4)).sum() > 0


def linear_on_the_grid(noise: float) -> QuantLinear:
    """Return a linear whose fourth output's weights are on its grid, but for noise as float32 leaves it."""
    linear = make_linear(QuantScheme(2, 16))
    generator = torch.Generator().manual_seed(3)
    on_grid = torch.randint(-1, 3, (24,), generator=generator) * 0.1
    linear.weight.data[3] = on_grid + noise * torch.randn(24, generator=generator)
    linear.weight_quantizer.set_range_(linear.weight)
    return linear


@pytest.mark.parametrize("kind", [AdaRound, DenseSTE, LoRARounding, LoRASTE])
def test_an_output_on_the_grid_stays(inputs, kind):
    torch.manual_seed(0)
    linear = linear_on_the_grid(1e-8)
    on_grid = linear.weight[3].clone()
    solver = LinearAdaRound(ReconstructionLoss(), partial(kind, learning_rate=1e-2), num_steps=200)
    with torch.no_grad():
        solver.solve_linear_(linear, (inputs.T @ inputs).double())
        torch.testing.assert_close(linear.weight_quantizer(linear.weight, linear.rounding)[3], on_grid)
    assert linear.changed_integers()[0] > 0, "the others learn"


def test_an_output_on_the_grid_does_not_hinder_others(inputs):
    """A share of next to nothing would be a billion: low rank would learn that output and no other."""
    found = []
    for noise in (0.0, 1e-8):
        torch.manual_seed(0)
        linear = linear_on_the_grid(noise)
        solver = LinearAdaRound(ReconstructionLoss(), partial(LoRASTE, learning_rate=1e-2), num_steps=200)
        with torch.no_grad():
            solver.solve_linear_(linear, (inputs.T @ inputs).double())
        found.append(linear.integers())
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_sizes_of_weights_and_inputs_do_not_matter(inputs, size):
    plain, scaled = solved(QuantScheme(3, 16), inputs), solved(QuantScheme(3, 16), inputs * size, size)
    assert (plain.integers() == scaled.integers()).float().mean() > 0.97


@pytest.mark.parametrize("hard_start", [0.5, 1.0])
def test_weights_are_rounded_down_or_up(inputs, hard_start):
    linear = solved(QuantScheme(3, 16, 8), inputs, hard_start=hard_start)
    quantizer = linear.weight_quantizer
    group = torch.arange(24) // 8
    steps = linear.weight / quantizer.scale.squeeze(-1)[:, group]
    zero_point = quantizer.zero_point.squeeze(-1)[:, group]
    low, high = ((bound + zero_point).clamp(0, 7) for bound in (steps.floor(), steps.ceil()))
    integers = linear.integers()
    assert ((integers == low) | (integers == high)).all()
    changed, total = linear.changed_integers()
    assert 0 < changed < total / 2
    hard = quantizer(linear.weight, linear.rounding)
    torch.testing.assert_close(hard, (integers - zero_point) * quantizer.scale.squeeze(-1)[:, group])


def test_regularizer_leaves_nothing_between_two_integers(inputs):
    """Before hardening; without it much is left."""
    between = []
    for weight in (0.0, 100.0):
        linear = solved(QuantScheme(3, 16), inputs, compensation_weight=weight, num_steps=400)
        linear.rounding.soften_()
        quantizer = linear.weight_quantizer
        soft = quantizer(linear.weight, linear.rounding) / quantizer.scale.squeeze(-1)
        between.append(((soft - soft.round()).abs() > 0.05).float().mean().item())
    assert between[0] > 0.4
    assert between[1] < 0.1


def test_only_the_rounding_is_learned(inputs):
    linear = make_linear(QuantScheme(3, 16))
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    gram = (inputs.T @ inputs).double()
    kept = gram.clone()
    with torch.no_grad():
        LinearAdaRound(ReconstructionLoss(), AdaRound, num_steps=20).solve_linear_(linear, gram)
    assert torch.equal(gram, kept)
    after = linear.state_dict()
    assert set(after) - set(before) == {"rounding.logits"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(parameter.requires_grad for parameter in linear.parameters())
    assert all(parameter.grad is None for parameter in linear.parameters()), "a gradient stays in memory"
    assert linear.rounding.last_penalty is None


BASELINE = {"num_steps": 60, "hard_start": 0.8}


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 61},
        {"compensation_weight": 0.0},
        {"beta_start": 4.0},
        {"beta_end": 10.0},
        {"warmup": 0.6},
        {"hard_start": 0.4},
        {"kind": partial(AdaRound, learning_rate=0.05)},
        {},
    ],
    ids=lambda change: ", ".join(change) or "the same again",
)
def test_nothing_is_wired_to_nothing(inputs, change):
    """In the logits; the same once more gives the same bits."""
    baseline, changed = (solved(QuantScheme(3, 16), inputs, **(BASELINE | each)) for each in ({}, change))
    assert torch.equal(baseline.rounding.logits, changed.rounding.logits) == (not change)


@pytest.mark.parametrize("kind", [partial(AdaRound, learning_rate=0)], ids=repr)
def test_nothing_to_learn_is_round_to_nearest(inputs, kind):
    assert solved(QuantScheme(3, 16), inputs, kind=kind).changed_integers() == (0, 240)


def test_inputs_that_are_always_zero_are_round_to_nearest(inputs):
    assert solved(QuantScheme(3, 16), torch.zeros_like(inputs)).changed_integers() == (0, 240)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        *[("reconstruction.num_steps", {"num_steps": value}) for value in (0, -1, 1.5, 10.0, True, "2", None)],
        *[
            ("reconstruction.compensation_weight", {"compensation_weight": value})
            for value in (-1, "1", None, True, float("nan"))
        ],
        *[("reconstruction.hard_start", {"hard_start": value}) for value in (0, 2)],
        *[
            ("reconstruction:", options)
            for options in (
                {"warmup": 1.0},
                {"warmup": -1},
                {"beta_start": 1.0},
                {"beta_end": 0.0},
                {"hard_start": "1"},
            )
        ],
        *[("rounding.learning_rate", {"rounding": partial(AdaRound, learning_rate=v)}) for v in (-1e-3, "1e-3", None)],
    ],
    ids=repr,
)
def test_values_out_of_range(key, options):
    with pytest.raises(InputError, match=rf"^{key} "):
        LinearAdaRound(ReconstructionLoss(), **({"rounding": AdaRound} | options))


def test_a_rounding_that_learns_nothing_is_refused():
    with pytest.raises(InputError, match="needs a rounding that learns"):
        LinearAdaRound(ReconstructionLoss(), Nearest)
