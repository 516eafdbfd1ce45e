"""No preprocessing ("w/o outlier pre-processing" of Table 3a)."""

import torch
from torch import nn

from cbq.preprocess.step import Preprocessing
from cbq.streams.places import ON_DEVICE, Place


class NoPreprocessing(Preprocessing):
    """Leaves the model as it came: the other end of every preprocessing ablation."""

    def apply_(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, place: Place = ON_DEVICE) -> None:
        """Do nothing.

        Args:
            model: the language model, its linears in the full-precision state.
            blocks: its blocks.
            segments: calibration token ids, (N, T).
            place: where streams are kept meanwhile.
        """
