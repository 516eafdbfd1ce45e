"""The guard, made necessary."""

import lightning as L
import pytest
import torch

from cbq.quant.linear import fuse_linears_, quant_linears
from cbq.quant.quantizer import act_quantizers
from cbq.quant.rounding import AdaRound, DenseSTE, LoRARounding
from cbq.quant.scheme import QuantScheme
from cbq.quant.step_size import ScaleMultiplier, SigmoidClipping
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.none import NoReconstruction
from cbq.reconstruction.scaling import LearnedScaling
from cbq.reconstruction.windows import SlidingWindows

W4A4 = QuantScheme(4, 4)
WINDOWS = SlidingWindows(2).plan(4)


class Spoil(L.Callback):
    """Makes the gradients, or the loss, of some steps useless."""

    def __init__(self, steps: set[int], value: float = float("nan"), loss: bool = False) -> None:
        self.steps, self.value, self.loss = steps, value, loss
        self.seen: list[list[torch.Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        self.seen.append([parameter.detach().clone() for parameter in module.learned])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if self.loss and trainer.global_step in self.steps:
            batch[1].fill_(self.value)

    def on_after_backward(self, trainer, module) -> None:
        if not self.loss and trainer.global_step in self.steps:
            module.learned[3].grad.flatten()[0] = self.value


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_healthy_run_needs_no_guard(run) -> None:
    setup = run(W4A4, learning_rate=5e-3, epochs=3, batch_size=1)
    assert [result.guard for result in setup.results] == [None] * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("loss", [False, True], ids=["gradient", "loss"])
def test_a_step_that_is_not_finite_is_not_taken(make_setup, make_solver, loss: bool, value: float) -> None:
    setup, spoil = make_setup(W4A4), Spoil({2, 3, 6}, value, loss)
    result = make_solver().solve(WINDOWS[0], setup.cache, [spoil])
    moved = [not same(before, after) for before, after in zip(spoil.seen, spoil.seen[1:], strict=False)]
    assert moved == [True, True, False, False, True, True, False]
    assert result.guard.startswith("3 steps skipped: not finite")
    assert all(torch.isfinite(p).all() for linear in quant_linears(setup.blocks[0]) for p in linear.parameters())
    if not loss:  # the targets of the other test are spoiled for good
        assert result.rec_loss_last < result.rec_loss_rtn


def test_one_bad_batch_spoils_its_accumulated_step(make_setup, make_solver) -> None:
    """Also where only its loss is bad, not its gradient."""

    class SpoilOne(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            if batch_index == 2:  # the first of the second step's two
                module.losses["loss/total"] = torch.tensor(float("inf"))

    solver = make_solver(epochs=1, batch_size=1, accumulate_grad_batches=2)
    result = solver.solve(WINDOWS[0], make_setup(W4A4).cache, [SpoilOne()])
    assert result.guard.startswith("1 steps skipped: not finite")


def test_some_in_a_row_begin_again_at_a_lower_rate(make_setup, make_solver) -> None:
    setup, spoil = make_setup(W4A4), Spoil(set(range(4, 9)))
    result = make_solver(epochs=4).solve(WINDOWS[0], setup.cache, [spoil])
    assert not same(spoil.seen[4], spoil.seen[0])
    assert same(spoil.seen[4], spoil.seen[8])
    assert same(spoil.seen[9], spoil.seen[0]), "back to the start"
    assert spoil.rates[9] < 0.11 * spoil.rates[8]
    assert not same(spoil.seen[10], spoil.seen[9])
    assert result.guard.startswith("5 steps skipped: not finite, 1 restarts at a lower rate")


def test_nothing_but_bad_steps_leaves_round_to_nearest(make_setup, make_solver) -> None:
    setup, spoil = make_setup(W4A4), Spoil(set(range(8)))
    result = make_solver().solve(WINDOWS[0], setup.cache, [spoil])
    assert result.rec_loss_last == pytest.approx(result.rec_loss_rtn, rel=1e-6)
    assert result.changed_integers == 0
    assert result.guard == "8 steps skipped: not finite, 1 restarts at a lower rate"


@pytest.mark.parametrize("kind", [DenseSTE, AdaRound, LoRARounding])
@pytest.mark.parametrize("rates", [{"weight_scale": 5.0}, {"act_scale": 5.0}, {"learning_rate": 1e6}], ids=str)
def test_absurd_rates_end_no_worse_than_round_to_nearest(make_setup, make_solver, kind, rates) -> None:
    setup = make_setup(W4A4)
    solver = make_solver(kind=kind, **rates)
    setup.solve(solver, SlidingWindows(2), [], num_windows=1)
    result = solver.solve(WINDOWS[1], setup.cache, [])
    for window_result in (*setup.results, result):
        assert window_result.rec_loss_last <= window_result.rec_loss_rtn
    assert any("fell back to the window's start" in str(r.guard) for r in (*setup.results, result))
    # What is reported is what the blocks compute.
    loss = NoReconstruction(ReconstructionLoss()).measure(WINDOWS[1], setup.cache, setup.cache.full_precision)
    assert loss == pytest.approx(result.rec_loss_last, rel=1e-5)


@pytest.mark.parametrize("step_size", [ScaleMultiplier, SigmoidClipping])
def test_a_start_worse_than_round_to_nearest_is_left_behind(make_setup, make_solver, step_size) -> None:
    """What the first window left is spoiled, and the second diverges: round-to-nearest, and the third goes on."""
    setup, solver = make_setup(W4A4), make_solver(step_size=step_size)
    setup.solve(solver, SlidingWindows(2), [], num_windows=1)
    for linear in quant_linears(setup.blocks[1]):
        for parameter in linear.weight_quantizer.step_size.parameters():
            parameter.fill_({ScaleMultiplier: 3.0, SigmoidClipping: -3.0}[step_size])
    result = solver.solve(WINDOWS[1], setup.cache, [Spoil(set(range(8)))])
    assert result.rec_loss_first > result.rec_loss_rtn
    assert "fell back to round-to-nearest" in result.guard
    assert result.rec_loss_last == result.rec_loss_rtn
    assert result.changed_integers == 0
    assert all((linear.weight_quantizer.step_size.multiplier == 1).all() for linear in quant_linears(setup.blocks[1]))
    loss = NoReconstruction(ReconstructionLoss()).measure(WINDOWS[1], setup.cache, setup.cache.full_precision)
    assert loss == pytest.approx(result.rec_loss_rtn, rel=1e-5)
    fuse_linears_(setup.blocks[1])
    setup.cache.advance_quantized(2)
    third = solver.solve(WINDOWS[2], setup.cache, [])
    assert third.guard is None
    assert third.rec_loss_last < third.rec_loss_rtn
    assert third.changed_integers > 0


def test_a_range_cut_off_too_far_is_covered_whole_again(make_setup, make_solver) -> None:
    """Preprocessing may cut weights off; round-to-nearest of the whole range is what a window is held against."""
    setup = make_setup(QuantScheme(8, 16))
    for linear in quant_linears(setup.blocks):
        linear.weight_quantizer.set_range_(linear.weight.clamp(-0.05, 0.05))
    result = make_solver(weight_scale=0.0, learning_rate=1e-6).solve(WINDOWS[0], setup.cache, [])
    assert result.rec_loss_first > 10 * result.rec_loss_rtn
    assert "fell back to round-to-nearest" in result.guard
    for linear in quant_linears(list(setup.blocks[:2])):
        values = linear.weight_quantizer(linear.weight, linear.rounding)
        step = linear.weight_quantizer.initial_scale.squeeze(-1)
        assert ((values - linear.weight).abs() <= 0.51 * step + 1e-6).float().mean() > 0.95


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_activations_cut_off_too_far_are_covered_whole_again(make_setup, make_solver, granularity) -> None:
    """Likewise; the loss that is reported is that of what is left."""
    setup = make_setup(QuantScheme(8, 8, act_granularity=granularity))
    for quantizer in act_quantizers(list(setup.blocks)):
        quantizer.set_range_(torch.tensor(-4.0), torch.tensor(4.0))
        quantizer.clip_ratio.fill_(0.1)
    solver = make_solver(weight_scale=0.0, act_scale=0.0, learning_rate=1e-6)
    result = solver.solve(WINDOWS[0], setup.cache, [])
    assert "fell back to round-to-nearest" in result.guard
    found = solver.measure(WINDOWS[0], setup.cache, setup.cache.full_precision)  # which is at the window's end
    assert found == pytest.approx(result.rec_loss_rtn, rel=1e-5)


def test_ranges_under_learned_scales_are_covered_whole_again(make_setup, make_solver) -> None:
    """Folding the scales into the weights does not bring the cut back."""
    setup = make_setup(QuantScheme(8, 8))
    for linear in quant_linears(setup.blocks):
        linear.weight_quantizer.set_range_(linear.weight.clamp(-0.05, 0.05))
    solver = make_solver(
        weight_scale=0.0, act_scale=0.0, learning_rate=1e-6, scaling=LearnedScaling(learning_rate=1e-6)
    )
    result = solver.solve(WINDOWS[0], setup.cache, [])
    assert "fell back to round-to-nearest" in result.guard
    for linear in quant_linears(list(setup.blocks[:2])):
        low, high = linear.weight_quantizer.covered_shares(linear.weight)
        assert low.min() > 0.99
        assert high.min() > 0.99


def test_a_block_learned_before_is_kept_where_that_is_better(make_setup, make_solver) -> None:
    """The second window diverges: its first block stays as the first window left it."""
    setup = make_setup(W4A4)
    solver = make_solver()
    setup.solve(solver, SlidingWindows(2), [], num_windows=1)
    learned = {name: p.clone() for name, p in setup.blocks[1].named_parameters()}
    solver.learning_rates = type(solver.learning_rates)(weight_scale=5.0, act_scale=5.0)
    result = solver.solve(WINDOWS[1], setup.cache, [])
    assert result.rec_loss_first < result.rec_loss_rtn
    assert "fell back to the window's start" in result.guard
    assert all(torch.equal(p, learned[name]) for name, p in setup.blocks[1].named_parameters())
    assert result.rec_loss_last == result.rec_loss_first


@pytest.mark.parametrize("spoiled", ["first", "nearest"])
def test_what_is_a_number_is_kept_where_what_it_is_held_against_is_none(
    make_setup, make_solver, monkeypatch, spoiled
) -> None:
    """Falling back would put a loss that is no number in the place of one that is."""
    setup, solver = make_setup(W4A4), make_solver()
    measured, order = [], ["first", "nearest", "last"]
    measure = solver.measure

    def spoil(*args) -> float:
        measured.append(measure(*args))
        return float("nan") if order[len(measured) - 1] == spoiled else measured[-1]

    monkeypatch.setattr(solver, "measure", spoil)
    result = solver.solve(WINDOWS[0], setup.cache, [])
    assert result.guard is None
    assert result.rec_loss_last == measured[2] < measured[1]
