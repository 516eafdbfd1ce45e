"""The three ways to take a window's steps."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.memory import Work
from benchmarks.plan import Plan
from benchmarks.shapes import SIZES
from benchmarks.steps import StepClock, WindowSteps, measure_case
from cbq.quant.linear import quant_linears

CPU = torch.device("cpu")


@pytest.mark.parametrize(("scheme", "rounding"), [("w4a4", "lora_ste"), ("w2a16", "adaround")])
def test_the_plain_loop_takes_the_steps_that_lightning_takes(scheme, rounding):
    """On one segment, repeated: the order, which each draws for itself, then does not matter."""
    steps = WindowSteps(Work(SIZES["tiny"], scheme, rounding, segments=6, tokens=8), CPU)
    steps.cache.quantized = steps.cache.quantized[:1].repeat(6, 1, 1)
    steps.cache.full_precision = steps.targets = steps.targets[:1].repeat(6, 1, 1)
    learned = [p for linear in quant_linears(list(steps.cache.blocks)) for p in learned_by(linear)]
    start = [p.detach().clone() for p in learned]
    ends = []
    for way in (steps.lightning, steps.plain_loop):
        assert way() > 0
        ends.append([p.detach().clone() for p in learned])
        for parameter, value in zip(learned, start, strict=True):
            parameter.copy_(value)
    assert all((end != begin).any() for end, begin in zip(ends[0], start, strict=True) if begin.numel() > 1)
    for lightning, plain in zip(*ends, strict=True):
        torch.testing.assert_close(plain, lightning)


def learned_by(linear) -> list[nn.Parameter]:
    of_inputs = linear.act_quantizer.parameters() if linear.act_quantizer else []
    return [*linear.weight_quantizer.parameters(), *of_inputs, *linear.rounding.parameters()]


def test_bare_step_is_of_the_same_blocks_and_of_every_weight(monkeypatch):
    steps = WindowSteps(Work(SIZES["tiny"], "w4a4", "lora_ste", segments=3, tokens=8), CPU)
    torch.testing.assert_close(steps.run_plain(steps.cache.quantized[:]), steps.targets[:])
    weights = [module.weight for module in steps.blocks.plain.modules() if isinstance(module, nn.Linear)]
    quantized = [linear.weight for linear in quant_linears(list(steps.cache.blocks))]
    assert len(weights) == 14
    assert {id(weight) for weight in weights} == {id(weight) for weight in quantized}, "shared, not copied"
    gradients = []
    for weight in weights:
        weight.requires_grad_(True).register_post_accumulate_grad_hook(
            lambda weight: gradients.append(weight.grad.abs().sum() > 0)
        )
    assert steps.bare() > 0
    assert len(gradients) == 3 * 14
    assert all(gradients)
    assert not any(weight.requires_grad for weight in weights)
    assert not any(weight.grad is not None for weight in weights)


def test_clock_leaves_out_the_first_step(monkeypatch):
    times = iter([10.0, 16.0])
    monkeypatch.setattr("benchmarks.steps.now", lambda device: next(times))
    clock = StepClock(4, CPU)
    for index in range(4):
        clock.on_train_batch_start(None, None, None, index)
        clock.on_train_batch_end(None, None, None, None, index)
    assert clock.seconds_a_step == 2.0


def test_rows_of_7b_on_a_gpu(monkeypatch):
    """31 windows of 384 steps; on a CPU nothing is extrapolated."""
    ways = SimpleNamespace(compiled=False, lightning=lambda: 0.02, plain_loop=lambda: 0.016, bare=lambda: 0.01)
    monkeypatch.setattr("benchmarks.steps.WindowSteps", lambda work, device: ways)
    work = Work(SIZES["7b"], "w4a4", "lora_ste", 3, 2048)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    rows = list(measure_case(work, Plan((work.size,), 2, gpu, quick=False)))
    assert [row.value for row in rows] == pytest.approx([2.0, 1.6, 1.25, 0.02 * 11904 / 60])
    assert (rows[0].expected, rows[3].expected, rows[3].unit) == (2.0, 4.0, "minutes")
    assert len(list(measure_case(work, Plan((work.size,), 2, cpu, quick=False)))) == 3
