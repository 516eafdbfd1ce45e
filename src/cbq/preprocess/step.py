"""What all preprocessing has in common."""

from abc import ABC, abstractmethod

import torch
from torch import nn

from cbq.streams.places import ON_DEVICE, Place


class Preprocessing(ABC):
    """What changes a model before anything is learned."""

    def check(self, blocks: nn.ModuleList) -> None:
        """Refuse blocks that `apply_` would refuse, before any work is done: by default none.

        Args:
            blocks: made quantizable.

        Raises:
            InputError: see the class.
        """
        return

    def clips_act_ranges(self, blocks: nn.ModuleList) -> bool:
        """Return whether `apply_` may make the quantizers of activations of the blocks, made quantizable, cover less
        than the whole range: by default not."""
        return False

    def notes(self, model: nn.Module) -> list[str]:
        """Return what is worth a word of what `apply_` will do to a model, made quantizable, in lines: by default
        nothing."""
        return []

    @abstractmethod
    def apply_(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
        """Change the blocks' weights, or the ranges of their quantizers.

        Args:
            model: the language model, its linears in the full-precision state.
            blocks: its blocks.
            segments: calibration token ids, (N, T).
            place: where streams are kept meanwhile.
        """
