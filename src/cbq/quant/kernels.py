"""How a formula of fake quantization runs over a whole tensor: the seam between the mathematics and the hardware.

Shapes: R rows, I features a row, G groups a row, g group size (G * g = I).
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map

from cbq.attributes import temporarily
from cbq.errors import InputError
from cbq.quant.formulas import Formula, Grid
from cbq.quant.logits import Fusion, LogitsSource

CPU_CHUNK = 1 << 17  # elements a thread: few enough for the caches, and enough to be worth a call of Python's
DEVICE_CHUNK = 1 << 22
RECOMPILE_LIMIT = 64  # kinds, soft and hard, bits and group sizes of a sweep share a code object; torch's own is 8
# On a CPU (docs/performance.md): weights times steps that win back the time a compiler takes, and weights of a window
# that win back what each call of a compiled function costs.
WORTH_COMPILING = 10**10
WORTH_CALLING = 10**7

logger = logging.getLogger(__name__)


class Kernels(ABC):
    """Runs a formula over a whole tensor."""

    @abstractmethod
    def forward(
        self, fusion: Fusion, x: torch.Tensor, grid: Grid, parameters: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return x (R, I) quantized and dequantized, in its dtype, and the sum of the penalty, if any."""

    @abstractmethod
    def backward(
        self,
        fusion: Fusion,
        gradient: torch.Tensor,
        penalty_gradient: torch.Tensor | None,
        x: torch.Tensor,
        grid: Grid,
        parameters: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradients of the scale, (R, G, 1), and of the logits or of x, (R, I)."""


class Blocked(Kernels):
    """A few rows at a time, so that what a formula makes on the way stays in the processor's cache. Needs no compiler.

    Rows do not touch each other, so that values and gradients are those of one pass over everything, to the bit where
    rows are of whole vectors (a CPU takes another exp and pow for what is left over), and where low-rank logits do not
    depend on how many rows are multiplied at once (some processors' do, in the last bit). The sum of the penalty, which
    is but shown, depends on the chunks in its last digits.
    """

    def forward(
        self, fusion: Fusion, x: torch.Tensor, grid: Grid, parameters: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, penalties = torch.empty(x.shape, dtype=x.dtype, device=x.device), []
        for rows in row_chunks(x):
            part, logits = grid.rows(rows), fusion.source.rows(parameters, rows)
            penalty = fusion.formula.forward(
                grouped(x[rows], part), grouped(logits, part), part, fusion.beta, view_as_groups(output[rows], part)
            )
            penalties.append(penalty)
        return output, None if fusion.beta is None else sum(penalties)

    def backward(
        self,
        fusion: Fusion,
        gradient: torch.Tensor,
        penalty_gradient: torch.Tensor | None,
        x: torch.Tensor,
        grid: Grid,
        parameters: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = grid.scale.dtype if parameters else x.dtype
        scale_gradient = torch.empty_like(grid.scale)
        row_gradient = torch.empty(x.shape, dtype=dtype, device=x.device)
        for rows in row_chunks(x):
            part, logits = grid.rows(rows), fusion.source.rows(parameters, rows)
            arguments = (grouped(tensor, part) for tensor in (x[rows], logits))
            out = view_as_groups(row_gradient[rows], part)
            scale_gradient[rows] = fusion.formula.backward(
                grouped(gradient[rows], part), penalty_gradient, *arguments, part, fusion.beta, out
            )
        return scale_gradient, row_gradient


def row_chunks(x: torch.Tensor) -> Iterator[slice]:
    """Yield slices of the rows of x (R, I), of about a cache's size each."""
    elements = CPU_CHUNK * torch.get_num_threads() if x.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, elements // x.shape[1])
    for start in range(0, len(x), step):
        yield slice(start, min(start + step, len(x)))


def view_as_groups(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return a view of x (R, I) as (R, G, g)."""
    return x.view(*grid.scale.shape[:2], -1)


def grouped(x: torch.Tensor | None, grid: Grid) -> torch.Tensor | None:
    """Return x (R, I) as (R, G, g) in the dtype of the grid, a copy where there is no other way."""
    return None if x is None else x.to(grid.scale.dtype).reshape(*grid.scale.shape[:2], -1)


def whole_forward(formula: Formula, source: LogitsSource) -> Callable:
    """Return `Kernels.forward` of all rows at once, as a compiler wants it."""

    def forward(x, grid, parameters, beta):
        groups, logits = grouped(x, grid), grouped(source.whole(parameters), grid)
        out = torch.empty_like(groups)
        penalty = formula.forward(groups, logits, grid, beta, out)
        return out.flatten(1).to(x.dtype), penalty

    return forward


def whole_backward(formula: Formula, source: LogitsSource) -> Callable:
    """Return `Kernels.backward` of all rows at once, as a compiler wants it."""

    def backward(gradient, penalty_gradient, x, grid, parameters, beta):
        gradient, groups, logits = (grouped(t, grid) for t in (gradient, x, source.whole(parameters)))
        out = torch.empty_like(groups)
        scale_gradient = formula.backward(gradient, penalty_gradient, groups, logits, grid, beta, out)
        return scale_gradient, out.flatten(1).to(out.dtype if parameters else x.dtype)

    return backward


class Compiled(Kernels):
    """One kernel each way, by `torch.compile`; where that does not work, `Blocked`, and a line in the log that says so.

    Values may differ from those of `Blocked` in the last digits.
    """

    def __init__(self) -> None:
        self.functions: dict[tuple, Callable] = {}
        self.works = True

    def forward(
        self, fusion: Fusion, x: torch.Tensor, grid: Grid, parameters: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        result = self._call(whole_forward, fusion, x, grid, parameters, beta_tensor(fusion, grid))
        return Blocked().forward(fusion, x, grid, parameters) if result is None else result

    def backward(
        self,
        fusion: Fusion,
        gradient: torch.Tensor,
        penalty_gradient: torch.Tensor | None,
        x: torch.Tensor,
        grid: Grid,
        parameters: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        beta = beta_tensor(fusion, grid)
        result = self._call(whole_backward, fusion, gradient, penalty_gradient, x, grid, parameters, beta)
        if result is None:
            return Blocked().backward(fusion, gradient, penalty_gradient, x, grid, parameters)
        return result

    def _call(self, make: Callable, fusion: Fusion, *arguments: Any) -> tuple | None:
        """Return what the compiled function gives, or None where there is no working compiler."""
        if not self.works:
            return None
        key = make, fusion.formula, fusion.source
        if key not in self.functions:
            self.functions[key] = torch.compile(make(fusion.formula, fusion.source), dynamic=True)
        # Parameters would be compiled once for every shape.
        arguments = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, nn.Parameter) else leaf, arguments)
        try:
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                return self.functions[key](*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a missing or broken compiler raises
            self.works = False
            reason = (str(error).strip().splitlines() or [""])[0]
            logger.warning("torch.compile does not work here, going on without: %s: %s", type(error).__name__, reason)
            return None


def beta_tensor(fusion: Fusion, grid: Grid) -> torch.Tensor | None:
    """Return beta as a tensor (): a number would be compiled in, and beta changes every step."""
    return None if fusion.beta is None else torch.full((), fusion.beta, device=grid.scale.device)


@cache
def compiled() -> Compiled:
    """Return the process's one `Compiled`, which compiles once for all windows."""
    return Compiled()


def check_compile(value: bool | str) -> None:
    """Refuse what is no choice of kernels.

    Raises:
        InputError: it is not auto, true or false.
    """
    if not (isinstance(value, bool) or value == "auto"):
        raise InputError(f"reconstruction.compile must be auto, true or false, got {value!r}")


def choose_kernels(compile: bool | str, device: torch.device, num_weights: int, num_steps: int) -> Kernels:
    """Return what runs the formulas of a window.

    Args:
        compile: true, false, or auto: on a GPU, and on a CPU where there is enough work.
        device: the weights'.
        num_weights: of the window.
        num_steps: that it is learned for.
    """
    enough = num_weights >= WORTH_CALLING and num_weights * num_steps >= WORTH_COMPILING
    wanted = {"auto": device.type == "cuda" or enough, True: True, False: False}
    return compiled() if wanted[compile] else Blocked()


class HasKernels(Protocol):
    """A quantizer."""

    kernels: Kernels


def run_by(quantizers: Iterable[HasKernels], kernels: Kernels) -> AbstractContextManager[None]:
    """Let `kernels` run the formulas of some quantizers, and what ran them before again at the end."""
    return temporarily(quantizers, "kernels", kernels)
