"""One preprocessing for weights alone, another where activations are quantized too."""

import torch
from torch import nn

from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.preprocess.step import Preprocessing
from cbq.quant.linear import QuantLinear
from cbq.streams.places import ON_DEVICE, Place


class ByScheme(Preprocessing):
    """Applies the one of two steps that is for what the model quantizes.

    Args:
        weights: where activations stay in full precision.
        activations: where those of any linear are quantized.

    Raises:
        InputError: one is no step.
    """

    def __init__(self, weights: Preprocessing, activations: Preprocessing) -> None:
        for name, step in (("weights", weights), ("activations", activations)):
            if not isinstance(step, Preprocessing):
                raise InputError(f"preprocess {name} must be a step of preprocessing, got {step!r}")
        self.weights = weights
        self.activations = activations

    def check(self, blocks: nn.ModuleList) -> None:
        self.step(blocks).check(blocks)

    def clips_act_ranges(self, blocks: nn.ModuleList) -> bool:
        return self.step(blocks).clips_act_ranges(blocks)

    def notes(self, model: nn.Module) -> list[str]:
        return self.step(get_blocks(model)).notes(model)

    def apply_(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
        """Change the blocks' weights, or the ranges of their quantizers.

        Args:
            model: the language model, its linears in the full-precision state.
            blocks: its blocks.
            segments: calibration token ids, (N, T).
            place: where streams are kept meanwhile.
        """
        self.step(blocks).apply_(model, blocks, segments, place)

    def step(self, blocks: nn.ModuleList) -> Preprocessing:
        """Return the one that is for what the blocks quantize."""
        linears = (module for module in blocks.modules() if isinstance(module, QuantLinear))
        quantized = any(linear.scheme.quantizes_activations for linear in linears)
        return self.activations if quantized else self.weights
