"""What is learned of a weight's grid, S_W: its scale alone, or both ends of its covered.

Shapes: O out_features, G groups a row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from cbq.quant.affine import SMALLEST_SCALE, round_ste

SMALLEST_MULTIPLIER = 0.05  # a learned step size never reaches 0, where it would divide by 0 or flip sign


@dataclass(frozen=True)
class Covered:
    """The values that a weight's grid covers before anything is learned, and that grid; all (O, G, 1), float32.

    Args:
        low: smallest value, at most 0.
        high: largest value, at least 0.
        scale: of the grid.
        zero_point: of the grid; integers.
        quant_max: largest integer.
        symmetric: the zero point is constant.
    """

    low: torch.Tensor
    high: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    quant_max: int
    symmetric: bool


class StepSize(nn.Module, ABC):
    """What one weight's grid is learned by: the interface of every kind.

    Args:
        like: (O, G, 1), the initial scale; only its shape and its device count.
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()

    @abstractmethod
    def grid(self, covered: Covered) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the learned scale, positive, and zero point, (O, G, 1), differentiable."""


class ScaleMultiplier(StepSize):
    """A multiplier on the initial scale; the zero point stays.

    Args:
        like: see `StepSize`.

    Source: S_W of Eq. 5 and 9.
    Note: a multiplier that starts at 1, so that one learning rate means the same for every model (METHOD 3).
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__(like)
        self.multiplier = nn.Parameter(torch.ones_like(like))

    def grid(self, covered: Covered) -> tuple[torch.Tensor, torch.Tensor]:
        return covered.scale * self.multiplier.clamp_min(SMALLEST_MULTIPLIER), covered.zero_point


class LearnedClipping(StepSize):
    """Both ends of the range, each times a factor of at most 1: scale and zero point follow.

    Symmetric weights have one range for both signs, and take the larger end.

    Attributes:
        zero_point_teaches: the gradient of the zero point passes straight through its rounding; else it has none.
    """

    zero_point_teaches = True

    @abstractmethod
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of the lower and of the upper end, (O, G, 1)."""

    def grid(self, covered: Covered) -> tuple[torch.Tensor, torch.Tensor]:
        lower, upper = self.factors()
        low, high = covered.low * lower, covered.high * upper
        if covered.symmetric:
            largest = torch.maximum(-low, high)
            return (largest / (covered.quant_max / 2)).clamp_min(SMALLEST_SCALE), covered.zero_point
        scale = ((high - low) / covered.quant_max).clamp_min(SMALLEST_SCALE)
        zero_point = -low / scale
        zero_point = round_ste(zero_point) if self.zero_point_teaches else zero_point.detach().round()
        return scale, zero_point.clamp(0, covered.quant_max)


class ClippingFactors(LearnedClipping):
    """The factors themselves, starting at 1 (SignRound's alpha and beta).

    Args:
        like: see `StepSize`.

    Source: Cheng et al. (2023), Eq. 3.
    """

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__(like)
        self.lower, self.upper = nn.Parameter(torch.ones_like(like)), nn.Parameter(torch.ones_like(like))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():  # brought back, not held: where a clamp acts it has no gradient, and 1 is the start
            self.lower.clamp_(SMALLEST_MULTIPLIER, 1)
            self.upper.clamp_(SMALLEST_MULTIPLIER, 1)
        return self.lower, self.upper


class SigmoidClipping(LearnedClipping):
    """The sigmoid of what is learned, starting at 4, where it is 0.982 (OmniQuant's learnable weight clipping).

    Args:
        like: see `StepSize`.

    Source: Shao et al. (2023), Eq. 2; that the zero point has no gradient, the released code.
    """

    zero_point_teaches = False

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__(like)
        self.lower, self.upper = nn.Parameter(torch.full_like(like, 4.0)), nn.Parameter(torch.full_like(like, 4.0))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lower.sigmoid(), self.upper.sigmoid()
