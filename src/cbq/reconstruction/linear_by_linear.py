"""A window solved one linear after the other, each by the Gram matrix of its inputs: the ground of GPTQ and AdaRound.

Shapes: N segments, T tokens, O out_features, I in_features.
"""

from abc import abstractmethod
from collections import Counter
from contextlib import suppress

import lightning as L
import torch

from cbq.activations import ActivationCache, autocast
from cbq.errors import InputError
from cbq.models.experts import every_token
from cbq.quant.linear import QuantLinear, quant_linears
from cbq.quant.quantizer import ActQuantizer
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.window_solver import Task, WindowSolver


class _StopForward(Exception):
    """Ends a forward pass once a linear's input is captured."""


def quantize_alike(one: ActQuantizer | None, other: ActQuantizer | None) -> bool:
    """Return whether two activation quantizers make the same of every input."""
    if one is None or other is None:
        return one is other
    options = [(type(q), q.bits, q.symmetric, q.denominator, q.as_engine) for q in (one, other)]
    tensors = [q.state_dict().values() for q in (one, other)]
    return options[0] == options[1] and all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@torch.no_grad()
def input_groups(cache: ActivationCache, start: int, index: int) -> list[list[QuantLinear]]:
    """Return the linears of a block in the order in which it runs them, those that read the same values together.

    Args:
        cache: its quantized stream must be at block `start`; one segment of it is run.
        start: first block of the window.
        index: the block.
    """
    groups: list[tuple[torch.Tensor, list[QuantLinear]]] = []

    def remember(linear: QuantLinear, args: tuple) -> None:
        for x, group in groups:
            if x is args[0] and quantize_alike(group[0].act_quantizer, linear.act_quantizer):
                group.append(linear)
                return
        groups.append((args[0], [linear]))

    linears = quant_linears(cache.blocks[index])
    hooks = [linear.register_forward_pre_hook(remember) for linear in linears]
    try:
        with autocast(cache.device), every_token(cache.blocks):
            cache.run_blocks(start, index + 1, cache.quantized[:1])
    finally:
        for hook in hooks:
            hook.remove()
    assert sum(len(group) for _, group in groups) == len(linears), "every linear of a block runs once"
    return [group for _, group in groups]


@torch.no_grad()
def gram_matrix(cache: ActivationCache, start: int, index: int, linear: QuantLinear) -> torch.Tensor:
    """Return the sum of x x^T over all tokens of the quantized stream, (I, I) float64, x what the linear multiplies.

    Args:
        cache: its quantized stream must be at block `start`.
        start: first block of the window.
        index: the block of the linear; it and those before it must be in the learned state.
        linear: if it quantizes its input, x is quantized.

    Raises:
        InputError: the products overflow.

    Note: products of a batch are float32, on a GPU too, where the rest of the forward is bfloat16; their sum is
        float64, so that many segments lose nothing.
    """
    captured: list[torch.Tensor] = []

    def stop(module: QuantLinear, args: tuple) -> None:
        captured.append(args[0])
        raise _StopForward

    gram = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64, device=cache.device)
    batches = cache.place.feed(([cache.quantized[part]] for part in cache.parts(len(cache))), cache.device)
    hook = linear.register_forward_pre_hook(stop)
    try:
        for (batch,) in batches:
            with autocast(cache.device), every_token(cache.blocks), suppress(_StopForward):
                cache.run_blocks(start, index + 1, batch)
            x = captured.pop()
            x = (linear.act_quantizer(x) if linear.act_quantizer else x).flatten(0, -2).float()
            gram += x.T @ x
    finally:
        hook.remove()
    if not gram.isfinite().all():
        raise InputError(f"the inputs of a linear in block {index} are too large: their products overflow float32")
    return gram


class LinearByLinear(WindowSolver):
    """Solves a window's linears in the order in which its blocks run them, each on what the solved ones before it
    give. Those of an overlap are solved anew. Step sizes stay what they are.

    Args:
        loss: Eq. 7; only measured.

    Attributes:
        notes: what kept linears of the present window sound.
    """

    def __init__(self, loss: ReconstructionLoss) -> None:
        super().__init__(loss)
        self.notes: list[str] = []

    @torch.no_grad()
    def learn_(self, task: Task, callbacks: list[L.Callback]) -> tuple[float, str | None]:
        """Solve the window's linears; callbacks hear of nothing: there is no fit."""
        window, cache = task.window, task.cache
        self.notes = []
        for index in range(window.rounding_start, window.stop):
            self.solve_block_(cache, window.start, index)
        notes = [f"{count} x {note}" for note, count in Counter(self.notes).items()]
        return self.measure(window, cache, task.targets), "; ".join(notes) or None

    @torch.no_grad()
    def solve_block_(self, cache: ActivationCache, start: int, index: int) -> None:
        """Give every linear of a block its rounding.

        Args:
            cache: its quantized stream must be at block `start`.
            start: first block of the window.
            index: the block; it and those before it must be in the learned state.
        """
        for group in input_groups(cache, start, index):
            linears = [linear for linear in group if linear.weight_quantizer is not None]
            if linears:
                gram = gram_matrix(cache, start, index, linears[0])
            for linear in linears:
                self.solve_linear_(linear, gram)

    @abstractmethod
    def solve_linear_(self, linear: QuantLinear, gram: torch.Tensor) -> None:
        """Give a linear its rounding, which must be hard.

        Args:
            linear: its weight is quantized.
            gram: the sum of x x^T over its inputs x, (I, I), float64. Not to be changed: other linears read it too.
        """
