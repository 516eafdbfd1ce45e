"""Integers that a solver computed, in the place of a rounding that is learned.

Shapes: O out_features, I in_features, G groups a row, g group size (G * g = I).
"""

import torch

from cbq.quant.rounding import Rounding


class GivenIntegers(Rounding):
    """Rounds to integers that are given, whatever the weight and its scale: nothing to learn.

    Args:
        values: (O, I), whole numbers of -255 to 255: the integers less the zero point. Kept in 16 bits.
        steps: (O, I), what was rounded to them, in units of the scale, for who goes on from there; or None.

    Example:
        >>> one = torch.ones(1, 1, 1)
        >>> GivenIntegers(torch.tensor([[-1, 3]]))(torch.zeros(1, 1, 2), one, one)
        tensor([[[-1.,  3.]]])
    """

    def __init__(self, values: torch.Tensor, steps: torch.Tensor | None = None) -> None:
        super().__init__(learning_rate=0.0)
        self.register_buffer("values", values.to(torch.int16))
        self.register_buffer("steps", None if steps is None else steps.float())

    def forward(self, groups: torch.Tensor, initial_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.values.view_as(groups).to(groups.dtype)
