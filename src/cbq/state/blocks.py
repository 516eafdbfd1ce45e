"""A block at any stage of a run, as tensors and the names of what they belong to; and back."""

from enum import Enum
from typing import Any

import torch
from torch import nn

from cbq.quant.given_integers import GivenIntegers
from cbq.quant.linear import QuantLinear, fuse_linears_
from cbq.quant.rounding import Nearest
from cbq.quant.state import QuantState, quantized_modules
from cbq.quant.step_size import ScaleMultiplier
from cbq.reconstruction.window_solver import WindowSolver
from cbq.state.generations import DamagedError


class Stage(Enum):
    """How far a block is."""

    PREPARED = "prepared"  # preprocessed, in the full-precision state
    LEARNED = "learned"  # by one window; another goes on from there
    FINISHED = "finished"  # fused


def kinds_of(block: nn.Module) -> dict[str, list[str]]:
    """Return, by the name of each linear whose weight is quantized, the classes of its rounding and its step size."""
    return {
        name: [type(linear.rounding).__name__, type(linear.weight_quantizer.step_size).__name__]
        for name, linear in block.named_modules()
        if isinstance(linear, QuantLinear) and linear.weight_quantizer is not None
    }


@torch.no_grad()
def restore_block_(
    block: nn.Module, stage: Stage, kinds: dict[str, list[str]], tensors: dict[str, torch.Tensor], solver: WindowSolver
) -> None:
    """Bring a block to where a saved one was.

    Args:
        block: as `make_quantizable_` left it.
        stage: of the saved one.
        kinds: what `kinds_of` returned of it; needed of a learned one only.
        tensors: its `state_dict`.
        solver: of the run: its own kinds of roundings and step sizes are known too.

    Raises:
        DamagedError: the tensors are of another block.
    """
    if stage is not Stage.PREPARED:
        for module in quantized_modules(block):
            module.state = QuantState.LEARNED
    if stage is Stage.LEARNED:
        for name, (rounding, step_size) in kinds.items():
            put_kinds_(block.get_submodule(name), rounding, step_size, solver)
    if stage is Stage.FINISHED:
        fuse_linears_(block)
    block.requires_grad_(False)
    own = block.state_dict()
    if described(own) != described(tensors):
        differing = sorted(set(described(own).items()) ^ set(described(tensors).items()))
        raise DamagedError(f"its tensors are of another block: {differing[0][0]}")
    # Copied into the memory that is there: its layout decides the last bits of matrix products.
    block.load_state_dict(tensors)


def put_kinds_(linear: QuantLinear, rounding: str, step_size: str, solver: WindowSolver) -> None:
    """Give a linear a rounding and a step size of the named classes, to be filled.

    Raises:
        DamagedError: neither the solver nor cbq makes such.
    """
    empty = torch.zeros_like(linear.weight, dtype=torch.float32)
    roundings: list[Any] = [Nearest(*linear.weight.shape), GivenIntegers(empty, empty), *solver.roundings(linear)]
    step_sizes: list[Any] = [ScaleMultiplier(linear.weight_quantizer.initial_scale), *solver.step_sizes(linear)]
    try:
        linear.rounding = next(kind for kind in roundings if type(kind).__name__ == rounding).to(empty.device)
        linear.weight_quantizer.step_size = next(kind for kind in step_sizes if type(kind).__name__ == step_size)
    except StopIteration:
        raise DamagedError(f"it has a rounding {rounding} and a step size {step_size}, of another solver") from None
    linear.rounding.harden_()


def described(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return the dtype and shape of each tensor."""
    return {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items()}
