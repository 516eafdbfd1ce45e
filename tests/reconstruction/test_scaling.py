"""Channel scales that are learned with a window."""

import copy

import lightning as L
import pytest
import torch

from cbq.errors import InputError
from cbq.preprocess.scaling import SmoothQuant
from cbq.quant.linear import quant_linears
from cbq.quant.rounding import AdaRound, Nearest
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state
from cbq.quant.step_size import SigmoidClipping
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.none import NoReconstruction
from cbq.reconstruction.scaling import LearnedScaling
from cbq.reconstruction.windows import SlidingWindows

W4A4 = QuantScheme(4, 4)
BLOCK = SlidingWindows(1).plan(4)[0]
OUTLIER = 5


@pytest.fixture
def setup(make_setup):
    """A setup whose first block has an outlier channel at each norm."""
    setup = make_setup(W4A4)
    with torch.no_grad():
        for norm in (setup.blocks[0].input_layernorm, setup.blocks[0].post_attention_layernorm):
            norm.weight[OUTLIER] *= 30
    return setup


def new(setup) -> set:
    return set(quant_linears(setup.blocks))


def output(setup) -> torch.Tensor:
    """What the first block makes of the stream in full precision."""
    with quant_state(setup.blocks[0], QuantState.FULL_PRECISION), torch.no_grad():
        return setup.cache.run_blocks(0, 1, setup.cache.quantized[:])


def test_scales_start_and_fold_without_a_trace(setup):
    before, names, expected = setup.state(), set(setup.model.state_dict()), output(setup)
    scaling = LearnedScaling().start(BLOCK, setup.cache, new(setup))
    torch.testing.assert_close(output(setup), expected, rtol=1e-3, atol=1e-4)
    scaling.reset_()
    assert torch.equal(output(setup), expected), "a scale of 1"
    for scale in scaling.channel_scales:
        torch.nn.init.normal_(scale.logarithm)
    torch.testing.assert_close(output(setup), expected, rtol=1e-3, atol=1e-2)  # of values up to some thousands
    scaling.fold_()
    torch.testing.assert_close(output(setup), expected, rtol=1e-3, atol=1e-2)
    assert set(setup.model.state_dict()) == names
    assert not any(module._forward_pre_hooks for module in setup.blocks[0].modules())
    changed = {name for name, tensor in setup.state().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if name.endswith("proj.weight") or name.endswith("norm.weight")} == {
        f"model.layers.0.{name}.weight"
        for name in (
            *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        )
    }
    for linear in quant_linears(setup.blocks[0]):
        assert torch.equal(linear.weight_quantizer.high.flatten(), linear.weight.amax(1).clamp_min(0))


def test_scales_start_as_smoothquants(setup):
    """What follows a norm, as the preprocessing of that name leaves it."""
    other = copy.deepcopy(setup.model)
    SmoothQuant(0.7).apply_(other, other.model.layers, setup.segments)
    LearnedScaling(alpha=0.7).start(BLOCK, setup.cache, new(setup)).fold_()
    for name in ("self_attn.q_proj", "mlp.gate_proj", "input_layernorm", "post_attention_layernorm"):
        mine, theirs = (blocks[0].get_submodule(name).weight for blocks in (setup.blocks, other.model.layers))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_only_where_inputs_are_quantized(make_setup):
    setup = make_setup(QuantScheme(2, 16))
    assert len(LearnedScaling().start(BLOCK, setup.cache, new(setup)).channel_scales) == 0
    assert len(LearnedScaling(weight_only=True).start(BLOCK, setup.cache, new(setup)).channel_scales) == 4


def test_learned_scales_lower_the_loss_and_stay_in_the_weights(setup, make_solver):
    options = {"kind": Nearest, "step_size": SigmoidClipping, "weight_scale": 1e-2, "act_scale": 0.0, "epochs": 6}
    still = copy.deepcopy(setup)
    without = make_solver(scaling=LearnedScaling(0.0, alpha=0.0), **options).solve(BLOCK, still.cache, [])
    expected = output(setup)
    result = make_solver(scaling=LearnedScaling(5e-2, alpha=0.0), **options).solve(BLOCK, setup.cache, [])
    assert result.guard is None
    assert result.rec_loss_last < without.rec_loss_last < result.rec_loss_rtn
    torch.testing.assert_close(output(setup), expected, rtol=2e-3, atol=1e-3)
    loss = NoReconstruction(ReconstructionLoss()).measure(BLOCK, setup.cache, setup.cache.full_precision)
    assert loss == pytest.approx(result.rec_loss_last, rel=1e-2)


def test_nothing_is_left_of_a_window_that_diverges(setup, make_solver):
    before = setup.state()
    solver = make_solver(scaling=LearnedScaling(), kind=Nearest, weight_scale=50.0)
    result = solver.solve(BLOCK, setup.cache, [])
    assert "fell back to the window's start" in result.guard
    assert result.rec_loss_last == result.rec_loss_first
    after = setup.state()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_ranges_that_preprocessing_cut_stay_cut(setup):
    linears = quant_linears(setup.blocks[0])
    for linear in linears:
        linear.weight_quantizer.set_range_(linear.weight * 0.7)
    before = [linear.weight_quantizer.high.clone() for linear in linears]
    scaling = LearnedScaling().start(BLOCK, setup.cache, new(setup))
    scaling.reset_()
    scaling.fold_()
    for linear, high in zip(linears, before, strict=True):
        torch.testing.assert_close(linear.weight_quantizer.high, high)
    LearnedScaling().start(BLOCK, setup.cache, new(setup)).fold_()
    for linear in linears:
        torch.testing.assert_close(linear.weight_quantizer.high.flatten(), linear.weight.amax(1) * 0.7)


def test_an_overlap_keeps_its_scales(setup):
    """What a window has learned starts at 1 in the next."""
    scaling = LearnedScaling().start(BLOCK, setup.cache, set())
    assert all((scale() == 1).all() for scale in scaling.channel_scales)
    scaling.fold_()


def test_an_error_leaves_the_weights_as_they_were(setup, make_solver):
    before = setup.state()

    class Fails(L.Callback):
        def on_train_batch_end(self, *arguments) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_solver(scaling=LearnedScaling(), kind=Nearest).solve(BLOCK, setup.cache, [Fails()])
    after = setup.state()
    weights = [name for name in before if name.endswith(("proj.weight", "norm.weight"))]
    assert all(torch.equal(after[name], before[name]) for name in weights)
    assert not any(module._forward_pre_hooks for module in setup.blocks[0].modules())


def test_a_static_range_does_not_follow(make_setup):
    setup = make_setup(QuantScheme(4, 4, act_granularity="tensor"))
    with pytest.raises(InputError, match="act_granularity=token"):
        LearnedScaling().start(BLOCK, setup.cache, new(setup))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling": True}, "scaling must be null or a LearnedScaling, got True"),
        ({"descent": "adam"}, "descent must be null or a Descent"),
        ({"step_size": None}, "step_size must name a class"),
        ({"kind": AdaRound, "step_size": SigmoidClipping}, "learned clipping needs a straight-through"),
        ({"scaling": LearnedScaling(), "start": GPTQ(ReconstructionLoss())}, "exclude each other"),
    ],
)
def test_parts_that_do_not_go_together(make_solver, options, message):
    with pytest.raises(InputError, match=message):
        make_solver(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "reconstruction.scaling.learning_rate must be a number of at least 0"),
        ({"alpha": 1.5}, "reconstruction.scaling.alpha must be at most 1, got 1.5"),
        ({"weight_only": "no"}, "reconstruction.scaling.weight_only must be true or false"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        LearnedScaling(**options)
