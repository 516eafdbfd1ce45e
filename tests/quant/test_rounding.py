"""Every rounding at its start, at its ends and in its gradients."""

import math

import numpy as np
import pytest
import torch

from cbq.errors import InputError
from cbq.quant.low_rank import low_rank_factors
from cbq.quant.quantizer import WeightQuantizer
from cbq.quant.rounding import (
    AdaRound,
    DenseSTE,
    LoRARounding,
    LoRASTE,
    Nearest,
    Rounding,
)
from cbq.quant.sigmoid import compensation_loss, rectified_sigmoid, shifted_rectified_sigmoid

SIGMOID_KINDS = [AdaRound, LoRARounding]
STRAIGHT_THROUGH_KINDS = [DenseSTE, LoRASTE]
LEARNED_KINDS = [*SIGMOID_KINDS, *STRAIGHT_THROUGH_KINDS]
SCHEMES = [(2, -1, False), (2, 8, True), (4, 4, False), (8, -1, False)]  # bits, group size, symmetric


def make(kind: type[Rounding], shape: tuple[int, int] = (6, 16)) -> Rounding:
    return kind(*shape, learning_rate=1e-2)


def disturb_(rounding: Rounding, size: float) -> None:
    """Move every parameter away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.fixture
def weight() -> torch.Tensor:
    """A weight (6, 16) none of whose elements is near the middle of two integers, in any of `SCHEMES`."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 16, generator=generator)
    for bits, group_size, symmetric in SCHEMES:
        quantizer = WeightQuantizer(weight, bits, group_size, symmetric)
        steps = weight.view(6, -1, 16 if group_size == -1 else group_size) / quantizer.scale
        inside = (steps.detach() % 1 - 0.5).abs()
        assert (inside[steps.abs() < 2 ** (bits - 1) - 0.5] > 1e-5).all(), "choose another seed"
    return weight


def nearest_by_hand(weight: torch.Tensor, quantizer: WeightQuantizer) -> np.ndarray:
    """Return round-to-nearest integers by numpy, (O, G, g)."""
    scale, zero_point = quantizer.initial_scale.numpy(), quantizer.zero_point.numpy()
    steps = weight.numpy().reshape(len(weight), scale.shape[1], -1) / scale
    return np.clip(np.rint(steps) + zero_point, 0, 2**quantizer.bits - 1)


def test_rectified_sigmoid_equals_numpy():
    logits = np.array([-1e4, -50.0, -3.0, -2.3978, -1.0, 0.0, 0.7, 2.3978, 2.5, 50.0, 1e4])
    with np.errstate(over="ignore"):
        expected = np.clip(1.2 / (1 + np.exp(-logits)) - 0.1, 0, 1)
    actual = rectified_sigmoid(torch.tensor(logits)).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    # Eq. 8 reaches 0 and 1 at logit(1 / 12) = -2.398, unlike a sigmoid.
    assert (actual[:3] == 0).all()
    assert (actual[-3:] == 1).all()
    assert 0 < actual[4] < actual[5] < actual[6] < 1


def test_shifted_sigmoid_equals_eq_8_at_the_shifted_logit():
    fraction = torch.linspace(0, 0.999, 41, dtype=torch.float64).unsqueeze(1)
    shift = torch.linspace(-30, 30, 61, dtype=torch.float64).unsqueeze(0)
    expected = rectified_sigmoid(torch.logit((fraction + 0.1) / 1.2) + shift)
    actual = shifted_rectified_sigmoid(fraction, shift.expand(41, 61))
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("shift", [-1000.0, -100.0, -89.0, 89.0, 1000.0])
def test_shifted_sigmoid_is_finite_at_extreme_shifts(shift):
    """Values and gradients, in float32."""
    shifts = torch.full((5,), shift, requires_grad=True)
    values = shifted_rectified_sigmoid(torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999]), shifts)
    values.sum().backward()
    assert values.tolist() == [float(shift > 0)] * 5
    assert shifts.grad.tolist() == [0.0] * 5


@pytest.mark.parametrize("beta", [2.0, 3.5, 20.0])
def test_compensation_loss_equals_double_loop(beta):
    values = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0.0
    for row in range(4):
        for column in range(5):
            total += 1 - abs(2 * values[row, column].item() - 1) ** beta
    assert compensation_loss(values, beta).item() == pytest.approx(total / 20)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0)])
def test_compensation_loss_at_the_ends(value, expected):
    values = torch.full((3, 3), value, requires_grad=True)
    loss = compensation_loss(values, 20.0)
    loss.backward()
    assert loss.item() == expected
    assert values.grad.isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", SIGMOID_KINDS)
def test_soft_sigmoid_starts_at_full_precision(kind, scheme, weight):
    bits, group_size, symmetric = scheme
    quantizer = WeightQuantizer(weight, bits, group_size, symmetric)
    groups = weight.view(6, quantizer.scale.shape[1], -1)
    # The smallest and largest weight of a group may lie up to half a step outside, where they are clipped.
    lowest = -quantizer.zero_point * quantizer.initial_scale
    highest = (2**bits - 1 - quantizer.zero_point) * quantizer.initial_scale
    inside = ((groups >= lowest) & (groups <= highest)).flatten(1)
    assert inside.float().mean() > 0.6
    values = quantizer(weight, make(kind))
    torch.testing.assert_close(values[inside], weight[inside], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [*LEARNED_KINDS, Nearest])
def test_hard_rounding_starts_as_round_to_nearest(kind, scheme, weight):
    quantizer = WeightQuantizer(weight, *scheme)
    rounding = Nearest(6, 16) if kind is Nearest else make(kind)
    rounding.harden_()
    integers = quantizer.integers(weight, rounding, *quantizer.grid()).detach().numpy()
    np.testing.assert_array_equal(integers, nearest_by_hand(weight, quantizer))


@pytest.mark.parametrize("kind", LEARNED_KINDS)
def test_hard_rounding_starts_as_round_to_nearest_on_ties_too(kind):
    """Weights in bfloat16 have ties: they must not count as changed integers."""
    groups = torch.linspace(-4, 4, 96).view(6, 1, 16).mul(2).round().div(2)
    one = torch.ones(6, 1, 1)
    rounding = make(kind)
    rounding.harden_()
    assert torch.equal(rounding(groups, one, one), torch.round(groups))


@pytest.mark.parametrize("kind", STRAIGHT_THROUGH_KINDS)
def test_straight_through_is_discrete_without_hardening(kind):
    groups, one = torch.linspace(-4, 4, 96).view(6, 1, 16), torch.ones(6, 1, 1)
    assert torch.equal(make(kind)(groups, one, one), torch.round(groups))


@pytest.mark.parametrize("kind", LEARNED_KINDS)
def test_an_integer_moves_by_one_at_most(kind, weight):
    """However far the parameters went; and it does move."""
    quantizer = WeightQuantizer(weight, 4)
    rounding = make(kind)
    disturb_(rounding, 30.0)
    rounding.harden_()
    integers = quantizer.integers(weight, rounding, *quantizer.grid()).detach().numpy()
    moved = integers - nearest_by_hand(weight, quantizer)
    assert set(np.abs(moved).flatten()) == {0.0, 1.0}


@pytest.mark.parametrize("kind", STRAIGHT_THROUGH_KINDS)
def test_straight_through_is_on_the_grid_of_the_learned_scale(kind):
    groups, one = torch.tensor([[[1.4, -2.6]]]), torch.ones(1, 1, 1)
    assert make(kind, (1, 2))(groups, one, 2 * one).tolist() == [[[1.0, -1.0]]]


@pytest.mark.parametrize("kind", SIGMOID_KINDS)
def test_sigmoid_integers_stay_when_the_scale_moves(kind, weight):
    quantizer = WeightQuantizer(weight, 3)
    rounding = make(kind)
    rounding.harden_()
    before = quantizer.integers(weight, rounding, *quantizer.grid())
    with torch.no_grad():
        quantizer.step_size.multiplier.fill_(0.7)
    assert torch.equal(quantizer.integers(weight, rounding, *quantizer.grid()), before)


@pytest.mark.parametrize("kind", SIGMOID_KINDS)
def test_hard_values_are_whole_and_soften_undoes_it(kind, weight):
    quantizer = WeightQuantizer(weight, 4)
    rounding = make(kind)
    disturb_(rounding, 0.5)
    soft = quantizer(weight, rounding)
    rounding.harden_()
    hard = quantizer.integers(weight, rounding, *quantizer.grid())
    assert torch.equal(hard, hard.round())
    soft_integers = soft.view(6, 1, 16) / quantizer.scale + quantizer.zero_point
    assert (hard - soft_integers).abs().max() <= 0.501, "a value is hardened to the nearer integer"
    rounding.soften_()
    assert torch.equal(quantizer(weight, rounding), soft)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", LEARNED_KINDS)
def test_gradients_reach_every_parameter(kind, hard, weight):
    quantizer = WeightQuantizer(weight, 4)
    rounding = make(kind)
    disturb_(rounding, 0.2)
    if hard:
        rounding.harden_()
    generator = torch.Generator().manual_seed(2)
    (quantizer(weight, rounding) * torch.randn(6, 16, generator=generator)).sum().backward()
    assert list(rounding.parameters())
    for parameter in [*rounding.parameters(), quantizer.step_size.multiplier]:
        assert parameter.grad.isfinite().all()
        assert (parameter.grad != 0).float().mean() > 0.6


@pytest.mark.parametrize("kind", SIGMOID_KINDS)
def test_sigmoid_gradient_equals_finite_difference(kind, weight):
    rounding = make(kind).double()
    disturb_(rounding, 0.2)
    scale = torch.full((6, 1, 1), 0.37, dtype=torch.float64)
    (parameter, *_) = rounding.parameters()

    def total() -> torch.Tensor:
        return (rounding(weight.double().view(6, 1, 16), scale, scale) * weight.view(6, 1, 16)).sum()

    total().backward()
    expected = parameter.grad[2, 1].item()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            parameter[2, 1] += step
            values.append(total().item())
            parameter[2, 1] -= step
    assert expected == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize("kind", SIGMOID_KINDS)
def test_penalty_is_that_of_the_last_forward(kind, weight):
    quantizer = WeightQuantizer(weight, 4)
    rounding = make(kind)
    quantizer(weight, rounding)
    assert rounding.penalty() is None, "it is off"
    rounding.beta = 2.0
    quantizer(weight, rounding)
    steps = weight / quantizer.scale.squeeze(-1)
    expected = (1 - (2 * (steps - steps.floor()) - 1).square()).mean().item()
    penalty = rounding.penalty()
    assert rounding.penalty() is None, "it is handed over once"
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    disturb_(rounding, 0.3)
    quantizer(weight, rounding)
    rounding.penalty().backward()
    assert all((parameter.grad != 0).any() for parameter in rounding.parameters())


@pytest.mark.parametrize("kind", SIGMOID_KINDS)
def test_no_penalty_when_hard_or_frozen(kind, weight):
    quantizer = WeightQuantizer(weight, 4)
    rounding = make(kind)
    rounding.beta = 2.0
    quantizer(weight, rounding)
    rounding.harden_()
    assert rounding.penalty() is None
    quantizer(weight, rounding)
    assert rounding.penalty() is None
    rounding.soften_()
    rounding.beta = 2.0
    rounding.requires_grad_(False)
    quantizer(weight, rounding)
    assert rounding.penalty() is None


@pytest.mark.parametrize("kind", STRAIGHT_THROUGH_KINDS)
def test_straight_through_has_no_penalty(kind, weight):
    rounding = make(kind)
    rounding.beta = 2.0
    WeightQuantizer(weight, 4)(weight, rounding)
    assert rounding.penalty() is None


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, 2.0, "3", None], ids=repr)
@pytest.mark.parametrize("kind", [LoRARounding, LoRASTE])
def test_rank_out_of_range(kind, rank):
    with pytest.raises(InputError, match=r"rounding\.rank "):
        kind(4, 4, learning_rate=1e-3, rank=rank)


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (3, 3), (6, 6), (7, 6), (1000, 6)])
def test_low_rank_factors(rank, expected):
    torch.manual_seed(0)
    a1, a2 = low_rank_factors(6, 16, rank)
    assert a1.shape == (6, expected)
    assert a2.shape == (expected, 16)
    assert (a1 @ a2 == 0).all()
    with torch.no_grad():
        a2.normal_()
    assert torch.linalg.matrix_rank(a1 @ a2).item() == expected


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_size_of_the_product_does_not_depend_on_the_rank(rank):
    torch.manual_seed(0)
    a1, _ = low_rank_factors(512, 512, rank)
    assert (a1 @ torch.ones(rank, 512)).std().item() == pytest.approx(1.0, rel=0.15)
    assert a1.std().item() == pytest.approx(1 / math.sqrt(rank), rel=0.15)


@pytest.mark.parametrize("kind", [LoRARounding, LoRASTE])
def test_low_rank_values_do_not_depend_on_autocast(kind):
    """On a GPU windows are learned and measured under bfloat16 autocast, and fused without."""
    rounding = make(kind, (64, 64))
    disturb_(rounding, 0.5)
    groups, one = torch.randn(64, 1, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rounding(groups, one, one)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, rounding(groups, one, one))


def test_a_larger_limit_reaches_farther_integers(weight):
    """An offset of 2 steps moves every integer by 2, where the grid has room; at the default limit by one half."""
    quantizer = WeightQuantizer(weight, 8)
    far, near = DenseSTE(6, 16, limit=3.0), DenseSTE(6, 16)
    for rounding in (far, near):
        torch.nn.init.constant_(rounding.offset_values, 2.0)
    nearest = quantizer.starting_integers(weight)
    moved = quantizer.integers(weight, far, *quantizer.grid()) - nearest
    room = nearest <= 253
    assert (moved[room] == 2).all()
    assert set((quantizer.integers(weight, near, *quantizer.grid()) - nearest)[room].unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("limit", [0, -1.0, float("inf"), "far", True], ids=str)
def test_bad_limits(limit):
    with pytest.raises(InputError, match="must be a number above 0"):
        DenseSTE(6, 16, limit=limit)


@pytest.mark.parametrize("kind", LEARNED_KINDS)
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "not finite"])
def test_outputs_that_are_reset_are_round_to_nearest_and_others_stay(weight, kind, broken):
    quantizer, rounding = WeightQuantizer(weight, 2), make(kind)
    disturb_(rounding, 3.0)
    rounding.harden_()
    before = quantizer(weight, rounding)
    if broken:
        for parameter in rounding.parameters():
            parameter.data[0, 0] = float("nan")
            parameter.data[0, 1] = float("inf")
    outputs = torch.tensor([True, False, False, True, False, True])
    outputs |= broken
    rounding.reset_(outputs)
    after, nearest = quantizer(weight, rounding), quantizer(weight, Nearest(6, 16))
    assert torch.equal(after[outputs], nearest[outputs])
    assert torch.equal(after[~outputs], before[~outputs])
    assert not torch.equal(before[outputs], nearest[outputs])
