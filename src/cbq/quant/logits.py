"""Where a rounding's logits come from, and which parameters their gradient goes to.

Shapes: O out_features, I in_features, R rank.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from cbq.quant.formulas import Formula

UNROLLED_RANK = 16  # up to here a compiler recomputes the product of A_1 and A_2 where it is needed


class LogitsSource(ABC):
    """How logits (O, I) are made of parameters. It holds none itself."""

    @abstractmethod
    def rows(self, parameters: tuple[torch.Tensor, ...], rows: slice) -> torch.Tensor | None:
        """Return the logits of some rows."""

    @abstractmethod
    def gradients(self, parameters: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients of the parameters for that of all logits, (O, I)."""

    def whole(self, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Return all logits, (O, I), written so that a compiler need not store them."""
        return self.rows(parameters, slice(None))


class NoLogits(LogitsSource):
    """A kind that learns no rounding."""

    def rows(self, parameters: tuple[torch.Tensor, ...], rows: slice) -> None:
        return None

    def gradients(self, parameters: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()


class DenseLogits(LogitsSource):
    """One parameter (O, I)."""

    def rows(self, parameters: tuple[torch.Tensor, ...], rows: slice) -> torch.Tensor:
        return parameters[0][rows]

    def gradients(self, parameters: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (gradient,)


class LowRankLogits(LogitsSource):
    """The product of A_1 (O, R) and A_2 (R, I)."""

    def rows(self, parameters: tuple[torch.Tensor, ...], rows: slice) -> torch.Tensor:
        a1, a2 = parameters
        return a1[rows] @ a2

    def gradients(self, parameters: tuple[torch.Tensor, ...], gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a1, a2 = parameters
        return gradient @ a2.t(), a1.t() @ gradient

    def whole(self, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
        a1, a2 = parameters
        if a1.shape[1] > UNROLLED_RANK:
            return self.rows(parameters, slice(None))
        return sum(a1[:, r : r + 1] * a2[r] for r in range(a1.shape[1]))


@dataclass(frozen=True)
class Fusion:
    """What one pass of fake quantization computes.

    Args:
        formula: the kind.
        source: of its logits.
        beta: the exponent of Eq. 12, or None for no penalty.
    """

    formula: Formula
    source: LogitsSource
    beta: float | None = None
