"""Which parts of a reconstruction go together."""

from collections.abc import Callable

import torch

from cbq.errors import InputError
from cbq.quant.rounding import Rounding, SigmoidRounding
from cbq.quant.step_size import LearnedClipping, StepSize
from cbq.reconstruction.descent import Descent
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.scaling import LearnedScaling


def check_parts(
    rounding: Callable[[int, int], Rounding],
    step_size: Callable[[torch.Tensor], StepSize],
    scaling: LearnedScaling | None,
    start: GPTQ | None,
    descent: Descent | None,
) -> None:
    """Refuse parts that are none, and those that do not go together. The arguments are those of `Reconstruction`.

    Raises:
        InputError: there is one.
    """
    for key, part, kind in (
        ("scaling", scaling, LearnedScaling),
        ("start", start, GPTQ),
        ("descent", descent, Descent),
    ):
        if part is not None and not isinstance(part, kind):
            raise InputError(f"reconstruction.{key} must be null or a {kind.__name__}, got {part!r}")
    if not callable(step_size):
        raise InputError(f"reconstruction.step_size must name a class of cbq.quant.step_size, got {step_size!r}")
    example = rounding(1, 1)
    if isinstance(example, SigmoidRounding) and isinstance(step_size(torch.ones(1, 1, 1)), LearnedClipping):
        raise InputError(
            "reconstruction.step_size: learned clipping needs a straight-through rounding or nearest; the sigmoid "
            "kinds round on the grid of the initial scale, which does not clip"
        )
    if start is not None:
        if scaling is not None:
            raise InputError("reconstruction.start and reconstruction.scaling exclude each other: scaling moves W / s")
        example.start_from_(torch.zeros(1, 1))
