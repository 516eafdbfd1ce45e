"""Optimizers and schedules other than the paper's, and which step a window ends with."""

import inspect

import hydra
import lightning as L
import pytest
import torch
from hydra.utils import instantiate

from cbq.cli import conf_dir
from cbq.quant.rounding import AdaRound, DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.descent import Descent, SignSGD
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.windows import SlidingWindows


def test_sign_descent_moves_every_value_by_its_rate():
    first, second = torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.zeros(2))
    before = first.detach().clone()
    optimizer = SignSGD([{"params": [first], "lr": 0.25}, {"params": [second], "lr": 1.0}])
    first.grad = torch.randn(3, 4) * torch.tensor([1e-6, 1.0, 1e6, 0.0])
    optimizer.step()
    assert torch.equal(first, before - 0.25 * first.grad.sign())
    assert torch.equal(second, torch.zeros(2)), "it has no gradient"


def test_sign_descent_leaves_out_a_step_that_is_not_finite():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SignSGD([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, float("nan"), -1.0])
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(3))


@pytest.mark.parametrize(
    ("method", "share"),
    [("signround", lambda done: 1 - done), ("omniquant", lambda done: 1.0)],
)
def test_schedules_of_the_presets(method, share):
    """SignRound's rate falls in a line to 0, OmniQuant's stays."""
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        descent = instantiate(hydra.compose("config", overrides=[f"method={method}"]).reconstruction.descent)
    optimizer = descent.optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0}])
    schedule = descent.schedule(optimizer, 10)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * share(step / 10))
        optimizer.step()
        schedule.step()


def test_the_options_of_reconstruction_default_are_those_of_the_python_api():
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        options = hydra.compose("config").reconstruction
    descent, defaults = instantiate(options.descent), inspect.signature(Reconstruction).parameters
    assert (descent.optimizer.func, descent.schedule.func) == (Descent().optimizer, Descent().schedule)
    assert instantiate(options.step_size).func is defaults["step_size"].default


class Record(L.Callback):
    """Each step's loss, and what it was measured on."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.values: list[list[torch.Tensor]] = []
        self.end: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.losses.append(module.losses["loss/rec"].item())
        self.values.append([parameter.detach().clone() for parameter in module.learned])

    def on_fit_end(self, trainer, module) -> None:
        self.end = [parameter.detach().clone() for parameter in module.learned]


@pytest.mark.parametrize(("kind", "start"), [(DenseSTE, 0.5), (AdaRound, 0.25), (AdaRound, 0.5)])
def test_the_best_step_is_kept(make_setup, make_solver, kind, start):
    """A rate that is far too large: the last step is not the best, and of soft rounding none counts."""
    record = Record()
    constant = Descent(schedule=lambda optimizer, steps: torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, 0.0))
    options = {"descent": constant, "keep_best": True, "hard_start": start, "warmup": 0.0, "epochs": 3}
    solver = make_solver(kind, weight_scale=0.3, **options)
    setup = make_setup(QuantScheme(4, 4))
    setup.solve(solver, SlidingWindows(2), [record], num_windows=1)
    counted = [step for step in range(12) if step >= start * 12 or kind is DenseSTE]
    best = min(counted, key=lambda step: record.losses[step])
    assert best != 11
    assert all(torch.equal(a, b) for a, b in zip(record.end, record.values[best], strict=True))


def test_without_hard_steps_the_last_one_is_kept(make_setup, make_solver):
    record, setup = Record(), make_setup(QuantScheme(4, 4))
    solver = make_solver(AdaRound, keep_best=True, hard_start=1.0)
    setup.solve(solver, SlidingWindows(2), [record], num_windows=1)
    assert not any(torch.equal(a, b) for a, b in zip(record.end, record.values[-1], strict=True))


def test_a_window_learns_by_sign_descent(make_setup, make_solver):
    descent = Descent(SignSGD, lambda optimizer, steps: torch.optim.lr_scheduler.PolynomialLR(optimizer, steps))
    record, setup = Record(), make_setup(QuantScheme(3, 16))
    setup.solve(make_solver(descent=descent, learning_rate=0.05), SlidingWindows(1), [record], num_windows=1)
    assert setup.results[0].rec_loss_last < setup.results[0].rec_loss_rtn
    moved = (record.values[1][-1] - record.values[0][-1]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05))
