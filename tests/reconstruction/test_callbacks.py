"""What the callbacks do in a real fit of a window."""

import itertools

import lightning as L
import pytest
import torch

from cbq.errors import InputError
from cbq.quant.rounding import AdaRound, Nearest
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.callbacks import BetaAnnealing, HardRounding
from cbq.reconstruction.curves import WindowCurves
from cbq.reconstruction.module import WindowModule
from cbq.reconstruction.windows import SlidingWindows

W4A4 = QuantScheme(4, 4)


class Probe(L.Callback):
    """Writes down, a step, beta, whether rounding is hard, and whether the step sizes and roundings get gradients."""

    def __init__(self) -> None:
        self.betas: list[float | None] = []
        self.hard: list[set[bool]] = []
        self.gradients: list[dict[str, bool]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: WindowModule, batch: object, batch_index: int) -> None:
        self.betas.append(module.beta)
        self.hard.append({rounding.hard for rounding in module.roundings})

    def on_before_optimizer_step(self, trainer: L.Trainer, module: WindowModule, optimizer: object) -> None:
        self.gradients.append(
            {name: any((p.grad != 0).any() for p in group["params"]) for name, group in module.groups.items()}
        )


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.mark.parametrize(("warmup", "stop"), [(0.2, 1.0), (0.0, 2 / 3), (0.5, 0.6)])
def test_beta_falls_from_start_to_end(warmup, stop):
    annealing = BetaAnnealing(20, 2, warmup, stop)
    assert annealing.beta(warmup) == pytest.approx(20)
    assert annealing.beta((warmup + stop) / 2) == pytest.approx(11)
    assert annealing.beta(stop) == annealing.beta(1.0) == pytest.approx(2)
    betas = [annealing.beta(warmup + (stop - warmup) * i / 50) for i in range(51)]
    assert all(first > second for first, second in itertools.pairwise(betas))
    assert all(annealing.beta(warmup * i / 10) is None for i in range(10 if warmup else 0))


def test_beta_falls_as_torchs_cosine(probe, run):
    """8 steps, the first 2 warm-up: the others follow `CosineAnnealingLR` from 20 to 2."""
    run(W4A4, callbacks=[probe], num_windows=1, kind=AdaRound, warmup=0.25, hard_start=1.0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=20.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6, eta_min=2.0)
    expected = []
    for _ in range(6):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert probe.betas[:2] == [None, None]
    assert probe.betas[2:] == pytest.approx(expected)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_start": 1.0, "beta_end": 2.0},
        {"beta_end": 0.0},
        {"beta_start": float("nan")},
        {"warmup": -0.1},
        {"warmup": 0.5, "stop": 0.5},
        {"stop": 1.1},
    ],
    ids=repr,
)
def test_annealing_out_of_range(options):
    with pytest.raises(InputError, match="reconstruction"):
        BetaAnnealing(**options)


@pytest.mark.parametrize("start", [0, -0.5, 1.01, float("nan")])
def test_hardening_out_of_range(start):
    with pytest.raises(InputError, match=r"reconstruction\.hard_start"):
        HardRounding(start)


@pytest.mark.parametrize(("hard_start", "soft_steps"), [(0.5, 4), (2 / 3, 6), (1.0, 8), (0.3, 3)])
def test_rounding_is_hard_from_the_right_step_on(probe, run, hard_start, soft_steps):
    """8 steps: step i, of progress i / 8, is hard from `hard_start` on; in every window, since each begins soft."""
    run(W4A4, callbacks=[probe], num_windows=2, kind=AdaRound, warmup=0.1, hard_start=hard_start)
    assert probe.hard == 2 * ([{False}] * soft_steps + [{True}] * (8 - soft_steps))


def test_scales_and_rounding_get_gradients_in_every_step(probe, run):
    """Also when rounding is hard."""
    run(W4A4, callbacks=[probe], num_windows=1, kind=AdaRound, hard_start=0.5)
    assert probe.hard[-1] == {True}
    assert probe.gradients == [{"weight_scale": True, "act_scale": True, "rounding": True}] * 8


@pytest.fixture
def recorded(run) -> list[list[dict[str, float]]]:
    """The rows of the three windows of an `AdaRound` run of 8 steps a window."""
    windows: list[list[dict[str, float]]] = []
    run(W4A4, callbacks=[WindowCurves(windows.append)], kind=AdaRound, learning_rate=1e-2, warmup=0.25, hard_start=0.75)
    return windows


def test_curves_have_every_name_on_one_axis(recorded):
    rows = [row for window in recorded for row in window]
    assert [row["cbq_step"] for row in rows] == list(range(24))
    assert [row["window"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    groups = ("weight_scale", "act_scale", "rounding")
    names = {"lr/rounding", "memory/host", "time/step_seconds", *(f"gradient_norm/{group}" for group in groups)}
    names |= {"loss/l2", "loss/kld", "loss/rec", "loss/com", "loss/total", "lr/weight_scale", "lr/act_scale"}
    for window in recorded:
        for i, row in enumerate(window):
            late = {"rounding/hard", "rounding/changed", "drift/weight_scale", "drift/act_scale"} if i == 7 else set()
            assert set(row) == {"cbq_step", "window", *names, *late, *(["beta"] if i >= 2 else [])}
            assert all(isinstance(value, int | float) for value in row.values())


def test_curves_of_a_run_that_goes_on(run, recorded):
    """Windows 1 and 2 alone: numbered as in the whole run."""
    rows: list[dict[str, float]] = []
    curves = WindowCurves(rows.extend)
    curves.step, curves.window = 8, 0
    run(W4A4, callbacks=[curves], num_windows=2, kind=AdaRound, warmup=0.25, hard_start=0.75)
    for number in ("cbq_step", "window"):
        assert [row[number] for row in rows] == [row[number] for window in recorded[1:] for row in window]
    assert (curves.step, curves.window) == (24, 2)


def test_curves_add_up(recorded):
    for window in recorded:
        for i, row in enumerate(window):
            assert row["loss/rec"] == pytest.approx(row["loss/l2"] + row["loss/kld"], rel=1e-5)
            assert row["loss/total"] == pytest.approx(row["loss/rec"] + row["loss/com"], rel=1e-5)
            assert (row["loss/com"] > 0) == (2 <= i < 6), "neither in the warm-up nor with hard rounding"


def test_learning_rates_follow_torchs_cosine(recorded):
    for name, rate in {"weight_scale": 1e-3, "act_scale": 1e-4, "rounding": 1e-2}.items():
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        expected = []
        for _ in range(8):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        for window in recorded:
            assert [row[f"lr/{name}"] for row in window] == pytest.approx(expected)


def test_curves_of_what_is_learned_only(run):
    rows: list[dict[str, float]] = []
    run(QuantScheme(2, 16), callbacks=[WindowCurves(rows.extend)], windows=SlidingWindows(4), kind=Nearest)
    assert {name for row in rows for name in row if name.startswith("lr/")} == {"lr/weight_scale"}
    assert all(row["loss/com"] == 0 for row in rows)
