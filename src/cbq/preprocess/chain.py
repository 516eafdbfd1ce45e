"""Several steps of preprocessing, one after the other."""

from collections.abc import Mapping

import torch
from torch import nn

from cbq.errors import InputError
from cbq.preprocess.step import Preprocessing
from cbq.streams.places import ON_DEVICE, Place


class Chain(Preprocessing):
    """Applies steps in order: what scales channels comes before what sets ranges, since scaling sets them anew.

    Args:
        steps: by a name of the user's choice; at least one.

    Raises:
        InputError: there is none, or one is no step.
    """

    def __init__(self, steps: Mapping[str, Preprocessing]) -> None:
        if not steps:
            raise InputError("preprocess.steps must name at least one step")
        for name, step in steps.items():
            if not isinstance(step, Preprocessing):
                raise InputError(f"preprocess.steps.{name} must be a step of preprocessing, got {step!r}")
        self.steps = list(steps.values())

    def check(self, blocks: nn.ModuleList) -> None:
        for step in self.steps:
            step.check(blocks)

    def clips_act_ranges(self, blocks: nn.ModuleList) -> bool:
        return any(step.clips_act_ranges(blocks) for step in self.steps)

    def notes(self, model: nn.Module) -> list[str]:
        return [line for step in self.steps for line in step.notes(model)]

    def apply_(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
        """Change the blocks' weights and the ranges of their quantizers.

        Args:
            model: the language model, its linears in the full-precision state.
            blocks: its blocks.
            segments: calibration token ids, (N, T).
            place: where streams are kept meanwhile.
        """
        for step in self.steps:
            step.apply_(model, blocks, segments, place)
