"""Gains of norms that are learned with a window."""

import copy

import lightning as L
import pytest
import torch

from cbq.errors import InputError
from cbq.quant.linear import quant_linears
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.norms import learned_gains, norms
from cbq.reconstruction.scaling import LearnedScaling
from cbq.reconstruction.windows import SlidingWindows

W2A16, W4A4 = QuantScheme(2, 16), QuantScheme(4, 4, qkv_bits=4)
GAINS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def gains_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(GAINS)}


@pytest.mark.parametrize("scheme", [W2A16, W4A4], ids=str)
def test_norms_are_what_the_model_names_so(make_setup, scheme):
    setup = make_setup(scheme)
    expected = [norm for block in setup.blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
    assert norms(list(setup.blocks)) == expected


def test_outputs_are_those_of_the_multiplied_gains(make_setup):
    """Inside and after, against a model whose gains are multiplied by hand."""
    setup, factors = make_setup(W2A16), torch.rand(4, 2, 64) + 0.5
    reference = copy.deepcopy(setup.model)
    with learned_gains(list(setup.blocks), wanted=True) as gains, torch.no_grad():
        for gain, factor in zip(gains, factors.flatten(0, 1), strict=True):
            gain.multiplier.copy_(factor)
        inside = setup.logits()
    for block, (first, second) in zip(reference.model.layers, factors, strict=True):
        block.input_layernorm.weight.mul_(first)
        block.post_attention_layernorm.weight.mul_(second)
    assert torch.equal(inside, reference(setup.segments).logits)
    assert torch.equal(inside, setup.logits())
    assert setup.model.state_dict().keys() == reference.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in setup.model.parameters())


def test_bfloat16_gains_stay_bfloat16(make_setup):
    setup = make_setup(W2A16)
    norm = setup.blocks[0].input_layernorm
    norm.to(torch.bfloat16)
    with learned_gains([setup.blocks[0]], wanted=True) as (gain, _):
        assert gain.multiplier.dtype == torch.float32
        assert norm.weight.dtype == torch.bfloat16
    assert norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", [W2A16, pytest.param(W4A4, marks=pytest.mark.slow)], ids=str)
def test_learned_gains_lower_the_loss(run, make_setup, scheme):
    """And only where they are wanted; the rest of what stays in full precision is left alone."""
    before = gains_of(make_setup(scheme).model)
    without, with_gains = run(scheme), run(scheme, norm=1e-2, epochs=6)
    same_length = run(scheme, epochs=6)
    assert all(torch.equal(gain, before[name]) for name, gain in gains_of(without.model).items())
    assert not any(torch.equal(gain, before[name]) for name, gain in gains_of(with_gains.model).items())
    losses = [[result.rec_loss_last for result in setup.results] for setup in (with_gains, same_length)]
    assert sum(losses[0]) < 0.98 * sum(losses[1])
    assert torch.equal(with_gains.model.lm_head.weight, without.model.lm_head.weight)
    assert torch.equal(with_gains.model.model.norm.weight, without.model.model.norm.weight)


def test_a_window_that_falls_back_keeps_its_gains(make_setup, make_solver):
    setup = make_setup(W2A16)
    before = gains_of(setup.model)
    setup.solve(make_solver(learning_rate=1e6, norm=1e3), SlidingWindows(2, 1), [])
    assert all("fell back" in result.guard for result in setup.results)
    assert all(torch.equal(gain, before[name]) for name, gain in gains_of(setup.model).items())


def test_round_to_nearest_has_the_gains_of_the_start(make_setup, make_solver):
    """A window that gets better, and yet not as good as round-to-nearest of the whole range."""
    setup, solver = make_setup(QuantScheme(8, 16)), make_solver(weight_scale=0.0, learning_rate=1e-6, norm=1e-4)
    before, window = gains_of(setup.model), SlidingWindows(2).plan(4)[0]
    for linear in quant_linears(setup.blocks):
        linear.weight_quantizer.set_range_(linear.weight.clamp(-0.05, 0.05))
    result = solver.solve(window, setup.cache, [])
    assert "round-to-nearest" in result.guard
    assert "the window's start" not in result.guard
    assert all(torch.equal(gain, before[name]) for name, gain in gains_of(setup.model).items())
    assert solver.measure(window, setup.cache, setup.cache.full_precision) == pytest.approx(result.rec_loss_rtn)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_leaves_the_gains_as_they_were(make_setup, make_solver, error):
    setup = make_setup(W2A16)
    before, names = gains_of(setup.model), list(setup.blocks[0].input_layernorm.state_dict())

    class Fails(L.Callback):
        def on_train_batch_end(self, *arguments) -> None:
            raise error

    with pytest.raises(error):
        setup.solve(make_solver(norm=1e-2), SlidingWindows(2, 1), [Fails()])
    assert all(torch.equal(gain, before[name]) for name, gain in gains_of(setup.model).items())
    assert list(setup.blocks[0].input_layernorm.state_dict()) == names


@pytest.mark.parametrize(
    "options",
    [{"scaling": LearnedScaling()}, {"homologous_weight": 0.5}, {"restart": True}],
    ids=lambda each: next(iter(each)),
)
def test_what_excludes_learned_gains(make_solver, options):
    with pytest.raises(InputError, match=r"^reconstruction.learning_rates.norm excludes"):
        make_solver(norm=1e-3, **options)
