"""One optimizer step of a window: in Lightning as cbq runs it, in a plain torch loop, and the bare limit.

- *Lightning*: `Reconstruction.solve`, with the listeners that a run has; only its steps are timed.
- *Plain loop*: the same blocks, loss, penalty, Adam and schedule in a `for` loop, with neither Lightning nor callbacks,
  nor the guard. What Lightning and the framework cost is the ratio of the two.
- *Bare*: forward and backward of the same blocks as plain transformers modules on the same weights, gradients of all
  linear weights included; no quantization, no loss, no optimizer. This is the limit: what a step learns, it learns
  from the gradient of every quantized weight.

All three take the same segments one at a time, and leave out their first step.
"""

import io
from collections.abc import Callable, Iterator
from unittest import mock

import lightning as L
import torch
from rich.console import Console
from torch import nn

from benchmarks.clock import interleave, now, ratios
from benchmarks.memory import Work, shortage
from benchmarks.plan import Plan
from benchmarks.rows import Row, Skipped
from benchmarks.shapes import ROUNDINGS, BlocksOfAWindow
from cbq.activations import autocast
from cbq.quant.kernels import Compiled, choose_kernels, run_by
from cbq.quant.linear import quant_linears
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState
from cbq.reconstruction.callbacks import BetaAnnealing, HardRounding
from cbq.reconstruction.curves import WindowCurves
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates, WindowModule
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.window_solver import WindowSolver
from cbq.reconstruction.windows import SlidingWindows
from cbq.report.progress import WindowProgress

# The first is what the bars are set for; the second is the default run.
CASES = (("w4a4", "lora_ste"), ("w2a16", "lora"))
LIMIT_BARS = {("cpu", "1b"): 1.5, ("cuda", "7b"): 2.0}
FRAMEWORK_BARS = {("cpu", "1b"): 1.05, ("cpu", "pico"): 1.15}
STEPS_OF_LLAMA_7B = 31 * 384  # windows of 2 with overlap 1 over 32 blocks; 3 epochs of 128 segments
WHOLE_RUN_BAR = 4.0  # minutes
STEPS_OF_A_WINDOW = 384  # of a real run: by them is chosen whether to compile


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """Yield the ratios of every size and case, and on a GPU how long all of LLaMA-7B would take."""
    for size in plan.sizes:
        for scheme, rounding in CASES:
            work = Work(size, scheme, rounding, segments=size.steps, tokens=size.on(plan.device))
            if why := shortage(work, plan.device):
                yield Skipped(f"step {work.case}", why)
            else:
                yield from measure_case(work, plan)


def measure_case(work: Work, plan: Plan) -> Iterator[Row]:
    """Yield the rows of one size and case."""
    steps = WindowSteps(work, plan.device)
    in_lightning, in_plain_loop, bare = interleave([steps.lightning, steps.plain_loop, steps.bare], plan.repeats)
    case = f"{work.size.name} 1x{work.tokens} {work.scheme.upper()} {work.rounding}"
    place = (plan.device.type, work.size.name)
    main_case = (work.scheme, work.rounding) == CASES[0]
    bar, framework_bar = (LIMIT_BARS.get(place), FRAMEWORK_BARS.get(place)) if main_case else (None, None)
    milliseconds = f"bare {1e3 * sorted(bare)[len(bare) // 2]:.3g} ms{', compiled' if steps.compiled else ''}"
    yield Row("step", "window step / bare step", case, ratios(in_lightning, bare), expected=bar, note=milliseconds)
    yield Row("step", "plain loop / bare step", case, ratios(in_plain_loop, bare))
    yield Row("step", "window step / plain loop", case, ratios(in_lightning, in_plain_loop), expected=framework_bar)
    if plan.device.type == "cuda" and work.size.name == "7b" and main_case:
        minutes = tuple(seconds * STEPS_OF_LLAMA_7B / 60 for seconds in in_lightning)
        note = "31 windows x 384 steps, from this step; targets, measuring and loading left out"
        yield Row("step", "all steps of 7B", case, minutes, "minutes", WHOLE_RUN_BAR, judged=False, note=note)


class WindowSteps:
    """A window whose steps can be taken in three ways; each method returns seconds a step.

    Args:
        work: the window: two blocks.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self.device = device
        self.blocks = BlocksOfAWindow(work.size, QuantScheme.parse(work.scheme), work.segments, device)
        self.cache = self.blocks.cache
        (self.window,) = SlidingWindows(2, 1).plan(2)
        self.loss = ReconstructionLoss()
        num_weights = sum(linear.weight.numel() for linear in quant_linears(list(self.cache.blocks)))
        self.kernels = choose_kernels("auto", device, num_weights, STEPS_OF_A_WINDOW)
        self.compiled = isinstance(self.kernels, Compiled)
        self.solver = Reconstruction(
            self.loss, ROUNDINGS[work.rounding], LearningRates(), epochs=1, compile=self.compiled
        )
        self.targets = self.cache.advance_full_precision(self.window.stop)
        self.num_steps = work.segments
        for linear in quant_linears(list(self.cache.blocks)):  # as a solve leaves them: the next one goes on
            linear.rounding = ROUNDINGS[work.rounding](linear.out_features, linear.in_features).to(device)
            linear.rounding.requires_grad_(False)
            linear.state = QuantState.LEARNED

    def lightning(self) -> float:
        """Solve the window and time its steps; what comes before and after them in `solve` is not timed."""
        clock = StepClock(self.num_steps, self.device)
        progress = WindowProgress(Console(file=io.StringIO()))
        progress.start(1, [self.num_steps])
        # Losses before and after say nothing here, and take most of the time of a solve of a few steps.
        with mock.patch.object(WindowSolver, "measure", return_value=0.0):
            self.solver.solve(self.window, self.cache, [WindowCurves(lambda rows: None), progress, clock])
        return clock.seconds_a_step

    def plain_loop(self) -> float:
        """Take the same steps without Lightning."""
        module = WindowModule(self.window, self.cache, self.loss, 1.0, LearningRates())
        annealing, hard_start = BetaAnnealing(stop=HardRounding().start), HardRounding().start
        optimizer = torch.optim.Adam(list(module.groups.values()), fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_steps)
        for rounding in module.roundings:
            rounding.soften_()
        module.learned.requires_grad_(True)
        order = torch.randperm(self.num_steps).split(1)

        def step(number: int) -> None:
            module.beta = annealing.beta(number / self.num_steps)
            if number >= hard_start * self.num_steps:
                for rounding in module.roundings:
                    rounding.harden_()
            with autocast(self.device):
                batch = [self.cache.quantized[order[number]], self.targets[order[number]]]
                loss = module.training_step(batch, number)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        with run_by(module.quantizers, self.kernels):
            seconds = self.seconds_a_step(step)
        module.learned.requires_grad_(False)
        module.zero_grad()
        return seconds

    def bare(self) -> float:
        """Take forward and backward of the plain blocks, gradients of the linear weights included."""
        weights = [module.weight for module in self.blocks.plain.modules() if isinstance(module, nn.Linear)]
        gradient = torch.randn_like(self.targets[:1])
        for weight in weights:
            weight.requires_grad_(True)

        def step(number: int) -> None:
            with autocast(self.device):
                output = self.run_plain(self.cache.quantized[number : number + 1])
            output.backward(gradient)
            for weight in weights:
                weight.grad = None

        seconds = self.seconds_a_step(step)
        for weight in weights:
            weight.requires_grad_(False)
        return seconds

    def seconds_a_step(self, step: Callable[[int], None]) -> float:
        """Take all steps by their number, and return the mean time of all but the first."""
        step(0)
        began = now(self.device)
        for number in range(1, self.num_steps):
            step(number)
        return (now(self.device) - began) / (self.num_steps - 1)

    def run_plain(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output (1, T, D) of the plain blocks."""
        for block, call in zip(self.blocks.plain, self.cache.calls_of(1), strict=True):
            output = block(hidden, *call.args, **call.kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


class StepClock(L.Callback):
    """Times all steps of a fit but the first. It must be the last callback.

    Args:
        num_steps: of the fit, at least 2.
        device: waited for at both ends, and not in between.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.num_steps = num_steps
        self.device = device
        self.began = self.ended = 0.0
        self.done = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: WindowModule, batch: object, batch_index: int) -> None:
        if self.done == 1:
            self.began = now(self.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: WindowModule, outputs: object, batch: object, batch_index: int
    ) -> None:
        self.done += 1
        if self.done == self.num_steps:
            self.ended = now(self.device)

    @property
    def seconds_a_step(self) -> float:
        """The mean over the timed steps."""
        assert self.done == self.num_steps, "the fit took another number of steps"
        return (self.ended - self.began) / (self.num_steps - 1)
