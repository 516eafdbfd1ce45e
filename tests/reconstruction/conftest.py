"""A tiny model to reconstruct, and the loop over its windows."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbq.activations import ActivationCache
from cbq.quant.linear import fuse_linears_
from cbq.quant.rounding import DenseSTE, Nearest
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates
from cbq.reconstruction.result import WindowResult
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.window_solver import WindowSolver
from cbq.reconstruction.windows import SlidingWindows

SEED = 7


@dataclass
class Setup:
    """A tiny model whose block linears are quantized, its streams, and what became of the windows solved so far."""

    model: PreTrainedModel
    cache: ActivationCache
    segments: torch.Tensor
    results: list[WindowResult] = field(default_factory=list)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    def solve(
        self,
        solver: WindowSolver,
        windows: SlidingWindows,
        callbacks: list[L.Callback],
        num_windows: int | None = None,
    ) -> None:
        """Solve the first `num_windows` windows in order; finished blocks end fused."""
        for window in windows.plan(len(self.blocks))[:num_windows]:
            self.results.append(solver.solve(window, self.cache, callbacks))
            for block in self.blocks[window.start : window.finished]:
                fuse_linears_(block)
            self.cache.advance_quantized(window.finished)

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of every tensor of the model."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model(self.segments).logits


@pytest.fixture(scope="session")
def tiny_llama(tiny_llama_folder: Path) -> PreTrainedModel:
    """The model of `tiny_llama_folder`; copy it before changing it."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def segments() -> torch.Tensor:
    """8 segments of 32 random tokens."""
    return torch.randint(320, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_setup(tiny_llama: PreTrainedModel, segments: torch.Tensor) -> Callable[[QuantScheme], Setup]:
    """Makes a fresh `Setup` for a scheme."""

    def make(scheme: QuantScheme) -> Setup:
        torch.manual_seed(SEED)  # the start of A1
        model = copy.deepcopy(tiny_llama)
        make_quantizable_(model, model.model.layers, scheme)
        return Setup(model, ActivationCache(model, model.model.layers, segments), segments)

    return make


@pytest.fixture(scope="session")
def make_solver() -> Callable[..., Reconstruction]:
    """Makes a solver: 8 steps a window unless told otherwise."""

    def make(
        kind: type = DenseSTE,
        learning_rate: float = 5e-3,
        weight_scale: float = 1e-3,
        act_scale: float = 1e-4,
        norm: float = 0.0,
        l2: float = 1.0,
        kld: float = 1.0,
        **options: object,
    ) -> Reconstruction:
        make_rounding = Nearest if kind is Nearest else partial(kind, learning_rate=learning_rate)
        options = {"epochs": 2, "batch_size": 2} | options
        return Reconstruction(
            ReconstructionLoss(l2, kld), make_rounding, LearningRates(weight_scale, act_scale, norm), **options
        )

    return make


@pytest.fixture
def run(make_setup: Callable[[QuantScheme], Setup], make_solver: Callable[..., Reconstruction]) -> Callable[..., Setup]:
    """Solves windows of the tiny model, all unless told otherwise; options are those of `make_solver`."""

    def solve(
        scheme: QuantScheme,
        windows: SlidingWindows | None = None,
        callbacks: tuple[L.Callback, ...] = (),
        num_windows: int | None = None,
        **options: object,
    ) -> Setup:
        setup = make_setup(scheme)
        setup.solve(make_solver(**options), windows or SlidingWindows(2, 1), list(callbacks), num_windows)
        return setup

    return solve
