"""Blocks whose weights are all `nn.Linear`s, and the way back to how a checkpoint stores them.

Shapes: O out_features, I in_features.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cbq.models.families import find_family, get_blocks


def to_linears_(model: PreTrainedModel) -> None:
    """Replace what multiplies by a transposed weight (I, O) in the blocks by an `nn.Linear`: GPT-2's `Conv1D`.

    Args:
        model: a model of one of the families. It computes the same.
    """
    for parent in list(get_blocks(model).modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous(), child.weight.requires_grad)
                linear.bias = child.bias
                setattr(parent, name, linear)


def to_stored(config: PreTrainedConfig, state: dict[str, torch.Tensor], linears: list[str]) -> dict[str, torch.Tensor]:
    """Return a model's state as its family's checkpoints have it.

    Args:
        config: the model's.
        state: by name; of a model after `to_linears_`.
        linears: the names of its blocks' linears.
    """
    if not find_family(config).stored_transposed:
        return state
    return state | {f"{name}.weight": state[f"{name}.weight"].T.contiguous() for name in linears}
