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
from cbq.quant.linear import fuse_linears_, quantize_linears_
from cbq.quant.rounding import DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates
from cbq.reconstruction.solver import NoReconstruction, Reconstruction, WindowResult
from cbq.reconstruction.windows import SlidingWindows

SEED = 7


@dataclass
class Setup:
    """A quantized tiny model with its streams, before any window is solved."""

    model: PreTrainedModel
    cache: ActivationCache
    results: list[WindowResult] = field(default_factory=list)

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks."""
        return self.model.model.layers

    def solve(
        self, solver: Reconstruction | NoReconstruction, windows: SlidingWindows, callbacks: list[L.Callback]
    ) -> None:
        """Solve every window in order; the blocks end fused."""
        for window in windows.plan(len(self.blocks)):
            self.results.append(solver.solve(window, self.cache, callbacks))
            for block in self.blocks[window.start : window.finished]:
                fuse_linears_(block)
            self.cache.advance_quantized(window.finished)

    def state(self) -> dict[str, torch.Tensor]:
        """Return a copy of every tensor of the model, each linear's state in it."""
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


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

    def make(scheme: QuantScheme, segments: torch.Tensor = segments) -> Setup:
        torch.manual_seed(SEED)
        model = copy.deepcopy(tiny_llama)
        quantize_linears_(model.model.layers, scheme)
        return Setup(model, ActivationCache(model, model.model.layers, segments))

    return make


@pytest.fixture
def run(make_setup: Callable[[QuantScheme], Setup]) -> Callable[..., Setup]:
    """Solves every window of the tiny model and returns what became of it."""

    def solve(
        scheme: QuantScheme = W2A16,
        windows: SlidingWindows = WINDOWS,
        callbacks: tuple[L.Callback, ...] = (),
        **options: object,
    ) -> Setup:
        setup = make_setup(scheme)
        setup.solve(make_solver(**options), windows, list(callbacks))
        return setup

    return solve


W2A16 = QuantScheme(2, 16)
W4A4 = QuantScheme(4, 4)
WINDOWS = SlidingWindows(2, 1)


def make_solver(
    kind: type = DenseSTE,
    learning_rate: float = 5e-3,
    weight_scale: float = 1e-3,
    act_scale: float = 1e-4,
    l2: float = 1.0,
    kld: float = 1.0,
    **options: object,
) -> Reconstruction:
    """Return a solver of 8 steps a window unless told otherwise."""
    make_rounding = kind if kind.__name__ == "Nearest" else partial(kind, learning_rate=learning_rate)
    options = {"epochs": 2, "batch_size": 2} | options
    return Reconstruction(ReconstructionLoss(l2, kld), make_rounding, LearningRates(weight_scale, act_scale), **options)
