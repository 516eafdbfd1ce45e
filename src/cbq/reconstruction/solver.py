"""How a window is solved by gradients."""

import signal
import warnings
from collections.abc import Callable, Sequence
from math import isnan

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from cbq.activations import ActivationCache
from cbq.errors import InputError, check_flag, check_number, check_seed
from cbq.models.families import find_family
from cbq.quant.kernels import check_compile, choose_kernels, run_by
from cbq.quant.linear import QuantLinear, quant_linears
from cbq.quant.quantizer import act_quantizers, gradients_through_ranges
from cbq.quant.rounding import Rounding
from cbq.quant.state import Quantized, QuantState, quant_state, quantized_modules
from cbq.quant.step_size import ScaleMultiplier, StepSize
from cbq.reconstruction.callbacks import BestStep, BetaAnnealing, HardRounding
from cbq.reconstruction.descent import Descent
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.guard import FiniteSteps, restore_
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates, WindowModule
from cbq.reconstruction.norms import learned_gains
from cbq.reconstruction.parts import check_parts
from cbq.reconstruction.result import window_blocks
from cbq.reconstruction.scaling import LearnedScaling, WindowScaling, given_back
from cbq.reconstruction.start import start_from_
from cbq.reconstruction.trainer import window_trainer
from cbq.reconstruction.window_solver import Task, WindowSolver
from cbq.reconstruction.windows import Window
from cbq.streams.kinds import Segments, Stream


class Reconstruction(WindowSolver):
    """Learns a window's step sizes and rounding by gradient descent on its reconstruction loss.

    Args:
        loss: Eq. 7.
        rounding: makes a linear's rounding from its out_features and in_features.
        learning_rates: of S_W and S_X.
        step_size: makes what a weight's grid is learned by, from its initial scale (O, G, 1).
        scaling: channel scales that are learned with each window; none if None.
        start: rounds a block's linears before it is learned; round-to-nearest if None.
        descent: the optimizer and its schedule.
        epochs: passes over the calibration segments, a window; or None.
        num_steps: optimizer steps a window; or None: one of both says how long a window is learned.
        batch_size: segments a batch.
        accumulate_grad_batches: batches an optimizer step, their gradients averaged: the steps of a larger batch in
            the memory of a small one. Where they do not divide, the last step of an epoch has fewer batches and a
            smaller gradient, as Lightning has it.
        compensation_weight: the gamma of Eq. 13.
        beta_start: see `BetaAnnealing`.
        beta_end: see `BetaAnnealing`.
        warmup: see `BetaAnnealing`.
        hard_start: share of the steps after which rounding is hard; beta reaches beta_end there.
        homologous_weight: see `WindowModule`.
        restart: learn a block in an overlap anew instead of going on from what the previous window learned.
        act_range_gradient: whether the gradient of quantized activations also passes through each token's range. A
            static range (quant.act_granularity=tensor) has none.
        keep_best: end with what the smallest batch's loss was measured on, among the steps with hard rounding.
        compile: fake quantization by `torch.compile`: true, false, or auto (see `choose_kernels`).
        seed: of the order of the segments.

    Raises:
        InputError: a value is out of range; by `check`, `scaling` cannot be learned with the blocks.

    Source: section 5.1 for the values that the paper prints.
    """

    def __init__(
        self,
        loss: ReconstructionLoss,
        rounding: Callable[[int, int], Rounding],
        learning_rates: LearningRates,
        step_size: Callable[[torch.Tensor], StepSize] = ScaleMultiplier,
        scaling: LearnedScaling | None = None,
        start: GPTQ | None = None,
        descent: Descent | None = None,
        epochs: int | None = 3,
        num_steps: int | None = None,
        batch_size: int = 1,
        accumulate_grad_batches: int = 1,
        compensation_weight: float = 1.0,
        beta_start: float = 20.0,
        beta_end: float = 2.0,
        warmup: float = 0.2,
        hard_start: float = 0.3333,
        homologous_weight: float = 0.0,
        restart: bool = False,
        act_range_gradient: bool = False,
        keep_best: bool = False,
        compile: bool | str = "auto",
        seed: int = 0,
    ) -> None:
        if (epochs is None) == (num_steps is None):
            raise InputError(
                f"reconstruction.epochs and reconstruction.num_steps: one must be null, the other not, "
                f"got {epochs!r} and {num_steps!r}"
            )
        length = {"epochs": epochs} if num_steps is None else {"num_steps": num_steps}
        for key, value in (
            length | {"batch_size": batch_size, "accumulate_grad_batches": accumulate_grad_batches}
        ).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"reconstruction.{key} must be an integer of at least 1, got {value!r}")
        for key, value in {
            "reconstruction.compensation_weight": compensation_weight,
            "reconstruction.homologous_weight": homologous_weight,
            "reconstruction.learning_rates.weight_scale": learning_rates.weight_scale,
            "reconstruction.learning_rates.act_scale": learning_rates.act_scale,
            "reconstruction.learning_rates.norm": learning_rates.norm,
            "rounding.learning_rate": rounding(1, 1).learning_rate,  # a wrong option speaks up before any work
        }.items():
            check_number(key, value)
        check_flag("reconstruction.restart", restart)
        check_flag("reconstruction.act_range_gradient", act_range_gradient)
        check_flag("reconstruction.keep_best", keep_best)
        check_seed("seed", seed)
        check_compile(compile)
        check_parts(rounding, step_size, scaling, start, descent)
        if learning_rates.norm and (scaling is not None or homologous_weight or restart):
            raise InputError(
                "reconstruction.learning_rates.norm excludes reconstruction.scaling, which moves the same gains, "
                "reconstruction.homologous_weight, whose target they would move, and reconstruction.restart: a gain "
                "that was learned is not restarted"
            )
        super().__init__(loss)
        self.rounding = rounding
        self.learning_rates = learning_rates
        self.learns_act_scale = learning_rates.act_scale != 0
        self.step_size = step_size
        self.scaling = scaling
        self.start = start
        self.descent = descent or Descent()
        self.epochs = epochs
        self.num_steps = num_steps
        self.batch_size = batch_size
        self.accumulate_grad_batches = accumulate_grad_batches
        self.compensation_weight = compensation_weight
        self.homologous_weight = homologous_weight
        self.num_streams = 3 if homologous_weight else 2  # of hidden states at one time
        self.restart = restart
        self.act_range_gradient = act_range_gradient
        self.compile = compile
        self.seed = seed
        self.hardening = HardRounding(hard_start)
        self.annealing = BetaAnnealing(beta_start, beta_end, warmup, hard_start)
        self.finite_steps = FiniteSteps()
        self.keepers = [BestStep()] if keep_best else []

    def check(self, blocks: nn.ModuleList) -> None:
        if self.scaling:
            self.scaling.check(blocks)

    def steps(self, num_segments: int) -> int:
        if self.num_steps is not None:
            return self.num_steps
        return self.epochs * -(-num_segments // (self.batch_size * self.accumulate_grad_batches))

    def learn_(self, task: Task, callbacks: list[L.Callback]) -> tuple[float, str | None]:
        scaling = self.scaling.start(task.window, task.cache, task.new) if self.scaling else None
        blocks, learns_gains = window_blocks(task.window, task.cache), self.learning_rates.norm > 0
        gain_offset = find_family(task.cache.config).gain_offset
        with given_back(scaling), learned_gains(blocks, learns_gains, gain_offset) as gains:
            module = WindowModule(
                task.window,
                task.cache,
                self.loss,
                self.compensation_weight,
                self.learning_rates,
                self.descent,
                scaling,
                gains,
                self.homologous_weight,
                self.accumulate_grad_batches,
            )
            if not module.groups:
                return self.measure(task.window, task.cache, task.targets) if scaling else task.first, None
            module.loss_at_start, module.loss_nearest = task.first, task.nearest
            self._fit(module, task.targets, callbacks)
            for linear in quant_linears(list(module.blocks)):
                linear.rounding.harden_()
            last = self.measure(task.window, task.cache, task.targets)
            return self._fall_back(module, scaling, task, last)

    def _fall_back(
        self, module: WindowModule, scaling: WindowScaling | None, task: Task, last: float
    ) -> tuple[float, str | None]:
        """Go back to the window's start, or to round-to-nearest, if what was learned is worse.

        Returns:
            the reconstruction loss of what is kept; what was done, or None.

        Note: only the start and the end are compared: the rates anneal to 0, so that a window that does not diverge
            ends at its best. Round-to-nearest is that of the weights as preprocessing scaled them, but not cut off,
            under gains of norms as the window before left them.
        """
        done = [self.finite_steps.describe()]
        kept = last
        if isnan(last) or last > task.first:
            restore_(module, self.finite_steps.start)
            if scaling:
                scaling.reset_()
            kept = task.first
            done.append(f"fell back to the window's start: the loss ended at {last:.4g}, not {task.first:.4g}")
        if isnan(kept) or kept > task.nearest:
            restore_(module, self.finite_steps.start)  # what is no rounding
            if scaling:
                scaling.reset_()
                scaling.cover_all_()
            for quantizer in act_quantizers(list(module.blocks)):
                quantizer.clip_ratio.fill_(1)
            for linear in quant_linears(list(module.blocks)):
                if linear.weight_quantizer is not None:
                    linear.weight_quantizer.set_range_(linear.weight)
            self._reset(quantized_modules(list(module.blocks)))
            for linear in quant_linears(list(module.blocks)):
                if linear.weight_quantizer is not None:  # other kinds need not start at the whole range
                    whole = ScaleMultiplier(linear.weight_quantizer.initial_scale)
                    linear.weight_quantizer.step_size = whole.requires_grad_(False)
            done.append(f"fell back to round-to-nearest: the loss was {kept:.4g}, not {task.nearest:.4g}")
            kept = task.nearest
        self.finite_steps.start = []
        return kept, "; ".join(filter(None, done)) or None

    def prepare_(self, window: Window, cache: ActivationCache) -> set[nn.Module]:
        """Give what is new to reconstruction its start; the rest goes on from what it learned. Roundings are hard."""
        modules, new = quantized_modules(window_blocks(window, cache)), super().prepare_(window, cache)
        if self.restart:
            new = set(modules)
        self._reset([module for module in modules if module in new])  # in order: some roundings start at random
        if self.start:
            start_from_(self.start, window, cache, new)
        for linear in quant_linears(window_blocks(window, cache)):
            linear.rounding.harden_()
        return new

    def roundings(self, linear: QuantLinear) -> list[Rounding]:
        return [self.rounding(linear.out_features, linear.in_features)]

    def step_sizes(self, linear: QuantLinear) -> list[StepSize]:
        return [self.step_size(linear.weight_quantizer.initial_scale)]

    def _reset(self, modules: Sequence[Quantized]) -> None:
        """Give modules what they start with: round-to-nearest, and everything to learn."""
        for linear in modules:
            if isinstance(linear, QuantLinear) and linear.weight_quantizer is not None:
                linear.rounding = self.rounding(linear.out_features, linear.in_features).to(linear.weight.device)
                linear.rounding.harden_()
                linear.weight_quantizer.step_size = self.step_size(linear.weight_quantizer.initial_scale)
        for quantizer in act_quantizers(list(modules)):
            torch.nn.init.ones_(quantizer.range_multiplier)
        for module in modules:
            module.requires_grad_(False)

    def _fit(self, module: WindowModule, targets: Stream, callbacks: list[L.Callback]) -> None:
        """Fit one window with a Trainer of its own."""
        window, cache = module.window, module.cache
        streams = [cache.quantized, targets]
        if self.homologous_weight:
            with quant_state(list(module.blocks), QuantState.FULL_PRECISION):
                streams.append(cache.map_stream(window.start, window.stop, cache.quantized))
        order = torch.Generator().manual_seed(self.seed * 100_003 + window.start)
        loader = DataLoader(Segments(streams), self.batch_size, shuffle=True, generator=order, collate_fn=list)
        for rounding in module.roundings:
            rounding.soften_()
        module.learned.requires_grad_(True)
        device = cache.device
        listeners = [self.annealing, self.hardening, self.finite_steps, *self.keepers, *callbacks]
        trainer = window_trainer(device, self.steps(len(cache)), self.accumulate_grad_batches, listeners)
        num_weights = sum(linear.weight.numel() for linear in quant_linears(list(module.blocks)))
        kernels = choose_kernels(self.compile, device, num_weights, trainer.max_steps)
        with warnings.catch_warnings():
            # Tensors in memory need no loader workers.
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # Lightning's own use of torch, not ours.
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            try:
                ranges = gradients_through_ranges(act_quantizers(list(module.blocks)), self.act_range_gradient)
                with run_by(module.quantizers, kernels), ranges:
                    trainer.fit(module, cache.place.feed(loader, cache.device))
            except SystemExit:  # what Lightning makes of Ctrl-C, leaving the signal ignored
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from None
            finally:
                module.learned.to(device)  # Lightning moves what it trained to the CPU
        for callback in trainer.callbacks:
            callback.__dict__.pop("log", None)  # Lightning's; would keep this window and its streams in memory
            callback.__dict__.pop("log_dict", None)
        module.learned.requires_grad_(False)
        module.zero_grad()  # the next window makes its own
