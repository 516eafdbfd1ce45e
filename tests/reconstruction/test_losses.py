"""The loss terms against torch's own modules and loops over single numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbq.errors import InputError
from cbq.reconstruction import losses
from cbq.reconstruction.losses import ReconstructionLoss, kld, l2, mse


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A target and an output, (3, 4, 8)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 8, generator=generator), 2 * torch.randn(3, 4, 8, generator=generator)


def test_kld_equals_torch_module(pair):
    """`batchmean` over tokens is the sum over features and the mean over tokens."""
    target, output = (states.flatten(0, 1) for states in pair)
    expected = nn.KLDivLoss(reduction="batchmean")(output.log_softmax(-1), target.softmax(-1))
    torch.testing.assert_close(kld(*pair), expected)


def test_kld_equals_loops(pair):
    total = 0.0
    for target, output in zip(*(states.flatten(0, 1).tolist() for states in pair), strict=True):
        p = [math.exp(value) / sum(map(math.exp, target)) for value in target]
        q = [math.exp(value) / sum(map(math.exp, output)) for value in output]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kld(*pair).item() == pytest.approx(total / 12, rel=1e-5)


def test_kld_is_from_the_target_to_the_output(pair):
    assert kld(*pair).item() != pytest.approx(kld(*reversed(pair)).item(), rel=1e-2)


def test_l2_equals_cdist_and_loops(pair):
    target, output = (states.flatten(0, 1) for states in pair)
    torch.testing.assert_close(l2(*pair), torch.cdist(target, output).diagonal().mean())
    rows = zip(target.tolist(), output.tolist(), strict=True)
    total = sum(math.sqrt(sum((a - b) ** 2 for a, b in zip(*row, strict=True))) for row in rows)
    assert l2(*pair).item() == pytest.approx(total / 12, rel=1e-5)


def test_mse_equals_loop(pair):
    values = zip(*(states.flatten().tolist() for states in pair), strict=True)
    assert mse(*pair).item() == pytest.approx(sum((a - b) ** 2 for a, b in values) / 96, rel=1e-5)


@given(st.lists(st.tuples(*[st.floats(-50, 50, width=32)] * 2), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_kld_is_never_negative(values):
    target, output = torch.tensor(values).T.view(2, 1, 1, -1)
    assert kld(target, output).item() >= -1e-5
    assert kld(target, target).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("term", [l2, kld, mse])
def test_equal_states_have_zero_loss_and_finite_gradient(term, pair):
    target = pair[0]
    output = target.clone().requires_grad_()
    loss = term(target, output)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("term", [l2, kld, mse])
def test_bfloat16_is_computed_in_float32(term, pair):
    rounded = [states.bfloat16() for states in pair]
    loss = term(*rounded)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, term(*(states.float() for states in rounded)))


def test_weighted_sum_and_unweighted_terms(pair):
    total, terms = ReconstructionLoss(l2=2, kld=0.5, mse=3)(*pair)
    assert list(terms) == ["l2", "kld", "mse"]
    torch.testing.assert_close(terms["l2"], l2(*pair))
    torch.testing.assert_close(terms["kld"], kld(*pair))
    torch.testing.assert_close(terms["mse"], mse(*pair))
    torch.testing.assert_close(total, 2 * terms["l2"] + 0.5 * terms["kld"] + 3 * terms["mse"])


def test_default_is_eq_7(pair):
    total, terms = ReconstructionLoss()(*pair)
    assert set(terms) == {"l2", "kld"}
    torch.testing.assert_close(total, terms["l2"] + terms["kld"])


@pytest.mark.parametrize("name", ["l2", "kld", "mse"])
def test_term_of_weight_zero_is_not_computed(name, pair, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setitem(losses.TERMS, name, refuse)
    weights = {"l2": 1, "kld": 1, "mse": 1}
    _, terms = ReconstructionLoss(**(weights | {name: 0}))(*pair)
    assert set(terms) == set(weights) - {name}
    with pytest.raises(AssertionError, match="computed"):
        ReconstructionLoss(**weights)(*pair)


@pytest.mark.parametrize("value", [-1, -0.5, True, "1", None, float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("name", ["l2", "kld", "mse"])
def test_weights_out_of_range(name, value):
    with pytest.raises(InputError, match=rf"loss\.{name} "):
        ReconstructionLoss(**{name: value})


def test_all_weights_zero():
    with pytest.raises(InputError, match=r"loss\.l2, loss\.kld and loss\.mse"):
        ReconstructionLoss(0, 0, 0)
