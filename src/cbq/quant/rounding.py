"""How weights are rounded: the axis of the paper's tables 3b and 12.

A rounding turns a weight in units of its scale into integers. Methods differ here and nowhere else:

- the sigmoid kinds (`LoRARounding`, the paper's; `AdaRound`) take floor(W / s) + Delta_W, with Delta_W in [0, 1] by
  Eq. 8, pushed to 0 or 1 by Eq. 12 and hardened late in a window;
- the straight-through kinds (`LoRASTE`, `DenseSTE`) take round(W / s + offset) with an offset in [-0.5, 0.5]:
  integers from the first step on, nothing to harden.

Shapes: O out_features, I in_features, R rank, G groups a row, g group size (G * g = I).
"""

import math
from abc import ABC, abstractmethod
from itertools import islice

import torch
from torch import nn

from cbq.errors import InputError
from cbq.quant.affine import round_ste
from cbq.quant.formulas import HARD_SIGMOID, NEAREST, SOFT_SIGMOID, straight_through
from cbq.quant.logits import DenseLogits, Fusion, LogitsSource, LowRankLogits, NoLogits
from cbq.quant.low_rank import low_rank_factors, low_rank_product
from cbq.quant.sigmoid import compensation_loss, shifted_rectified_sigmoid


class Rounding(nn.Module, ABC):
    """How one linear's weight is rounded: the interface of every kind.

    `forward` is the definition, in plain autograd. `fusion` says how the same is computed in one pass.

    Args:
        learning_rate: Adam's rate for this rounding's parameters.

    Attributes:
        beta: the exponent of Eq. 12 in the next forwards, or None while the compensation loss is off.
        last_penalty: the compensation loss of the last forward, until `penalty` takes it.
    """

    hard = True
    source: LogitsSource = NoLogits()

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.beta: float | None = None
        self.last_penalty: torch.Tensor | None = None

    @abstractmethod
    def forward(self, groups: torch.Tensor, initial_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return the rounded values of a weight, before the zero point and the clipping.

        Args:
            groups: the full-precision weight, (O, G, g), float32.
            initial_scale: (O, G, 1), before learning.
            scale: (O, G, 1), the learned weight_scale.

        Returns:
            (O, G, g), integers (or, for the sigmoid kinds before hardening, values between two integers).
        """

    def fusion(self) -> Fusion | None:
        """Return what computes `forward` and what follows it in one pass, or None: there is none for this kind."""
        return None

    def penalty(self) -> torch.Tensor | None:
        """Hand over the compensation loss of the last forward, or None where there is nothing to regularize."""
        penalty, self.last_penalty = self.last_penalty, None
        return penalty

    def start_from_(self, offset: torch.Tensor) -> None:
        """Start from elsewhere than round-to-nearest.

        Args:
            offset: (O, I), in units of the scale: what is rounded, less W / s.

        Raises:
            InputError: this kind cannot.
        """
        raise InputError("reconstruction.start needs a rounding with one offset a weight: rounding=dense_ste")

    @torch.no_grad()
    def reset_(self, outputs: torch.Tensor) -> None:
        """Round some outputs to nearest again.

        Args:
            outputs: which, (O,), boolean.

        Note: what a kind learns first has a row an output, and one of zeros moves nothing.
        """
        for parameter in self.parameters():
            parameter.nan_to_num_(0, 0, 0)  # zero times it would be no number
        for parameter in islice(self.parameters(), 1):
            parameter[outputs] = 0

    def harden_(self) -> None:
        """Make every following forward return integers; gradients pass straight through."""

    def soften_(self) -> None:
        """Undo `harden_`: a block in the overlap of two windows is learned again."""


class Nearest(Rounding):
    """Round to nearest on the grid of the learned scale: nothing to learn.

    Args:
        out_features: O.
        in_features: I.

    Source: "w/o Rounding" of Table 3b.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(learning_rate=0.0)

    def forward(self, groups: torch.Tensor, initial_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return round_ste(groups / scale)

    def fusion(self) -> Fusion:
        return Fusion(NEAREST, self.source)


class SigmoidRounding(Rounding):
    """floor(W / s) + Delta_W, where s is the initial scale.

    Note: floor(W / s) would jump when s moves, so floor and V0 stay at the initial scale and the learned scale is the
        dequantization factor (METHOD 3).
    """

    def __init__(self, learning_rate: float) -> None:
        super().__init__(learning_rate)
        self.hard = False

    @abstractmethod
    def rounding_logits(self) -> torch.Tensor:
        """Return the learned V - V0, (O, I)."""

    def forward(self, groups: torch.Tensor, initial_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        steps = groups / initial_scale
        low = steps.floor()
        values = shifted_rectified_sigmoid(steps - low, self.rounding_logits().view_as(groups))
        if self.hard:  # the late phase at the end of section 3.2
            return round_ste(low + values)
        if self.beta is not None and values.requires_grad:
            self.last_penalty = compensation_loss(values, self.beta)
        return low + values

    def fusion(self) -> Fusion:
        if self.hard:
            return Fusion(HARD_SIGMOID, self.source)
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        return Fusion(SOFT_SIGMOID, self.source, self.beta if learns else None)

    def harden_(self) -> None:
        self.hard, self.beta, self.last_penalty = True, None, None

    def soften_(self) -> None:
        self.hard = False


class AdaRound(SigmoidRounding):
    """Eq. 8 with one logit a weight.

    Args:
        out_features: O.
        in_features: I.
        learning_rate: of the logits.

    Source: Eq. 8, 9 and 12 ("w/ Adarounding" and "w/ Rounding" of Table 3b).
    """

    source = DenseLogits()

    def __init__(self, out_features: int, in_features: int, learning_rate: float = 1e-1) -> None:
        super().__init__(learning_rate)
        self.logits = nn.Parameter(torch.zeros(out_features, in_features))

    def rounding_logits(self) -> torch.Tensor:
        return self.logits


class LoRARounding(SigmoidRounding):
    """The paper's LoRA-Rounding: Eq. 8 with logits V0 + A1 A2.

    Args:
        out_features: O.
        in_features: I.
        learning_rate: of A1 and A2; the paper's is 1e-4.
        rank: R, 1 to min(O, I); a larger one is cut down to it.

    Source: Eq. 8, 11 and 12.
    """

    source = LowRankLogits()

    def __init__(self, out_features: int, in_features: int, learning_rate: float = 1e-4, rank: int = 5) -> None:
        super().__init__(learning_rate)
        self.a1, self.a2 = low_rank_factors(out_features, in_features, rank)

    def rounding_logits(self) -> torch.Tensor:
        return low_rank_product(self.a1, self.a2)


class StraightThroughRounding(Rounding):
    """round(W / s + offset), on the grid of the learned scale s.

    Args:
        learning_rate: of the offset.
        limit: the largest offset, in units of the scale: at 0.5 a weight reaches its two neighbouring integers.

    Raises:
        InputError: limit is not above 0.
    """

    def __init__(self, learning_rate: float, limit: float) -> None:
        super().__init__(learning_rate)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise InputError(f"rounding.limit must be a number above 0, got {limit!r}")
        self.limit = float(limit)

    @abstractmethod
    def offset(self) -> torch.Tensor:
        """Return the learned offset in units of the scale, (O, I), before clipping."""

    def forward(self, groups: torch.Tensor, initial_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return round_ste(groups / scale + self.offset().view_as(groups).clamp(-self.limit, self.limit))

    def fusion(self) -> Fusion:
        return Fusion(straight_through(self.limit), self.source)


class DenseSTE(StraightThroughRounding):
    """round(W / s + offset), one offset a weight.

    Args:
        out_features: O.
        in_features: I.
        learning_rate: of the offsets.
        limit: see `StraightThroughRounding`.

    Note: not in the paper. The dense form of METHOD 2; in our measurements the strongest kind.
    """

    source = DenseLogits()

    def __init__(self, out_features: int, in_features: int, learning_rate: float = 5e-3, limit: float = 0.5) -> None:
        super().__init__(learning_rate, limit)
        self.offset_values = nn.Parameter(torch.zeros(out_features, in_features))

    @torch.no_grad()
    def start_from_(self, offset: torch.Tensor) -> None:
        self.offset_values.copy_(offset.clamp(-self.limit, self.limit))

    def offset(self) -> torch.Tensor:
        return self.offset_values


class LoRASTE(StraightThroughRounding):
    """round(W / s + A1 A2), discrete from the first step on.

    Args:
        out_features: O.
        in_features: I.
        learning_rate: of A1 and A2.
        rank: R, 1 to min(O, I); a larger one is cut down to it.
        limit: see `StraightThroughRounding`.

    Note: not in the paper. A low-rank V cannot saturate the sigmoid of every element, so hardening jumps back
        towards round-to-nearest; a straight-through offset has nothing to saturate (METHOD 2).
    """

    source = LowRankLogits()

    def __init__(
        self, out_features: int, in_features: int, learning_rate: float = 5e-3, rank: int = 5, limit: float = 0.5
    ) -> None:
        super().__init__(learning_rate, limit)
        self.a1, self.a2 = low_rank_factors(out_features, in_features, rank)

    def offset(self) -> torch.Tensor:
        return low_rank_product(self.a1, self.a2)
