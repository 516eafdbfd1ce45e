"""Blocks whose weights are all `nn.Linear`s, and the way back to how a checkpoint stores them.

Shapes: O out_features, I in_features.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cbq.models.experts import to_experts_, to_fused
from cbq.models.families import find_family, get_blocks


def to_linears_(model: PreTrainedModel) -> Callable[[], None]:
    """Replace what is no `nn.Linear` in the blocks by such: GPT-2's `Conv1D`, whose weight is (I, O), and experts.

    Args:
        model: a model of one of the families. It computes the same.

    Returns:
        what puts everything back.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    if experts := find_family(model.config).experts:
        replaced += to_experts_(get_blocks(model), experts)
    for parent in list(get_blocks(model).modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(child.nx, child.nf, device="meta")
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous(), child.weight.requires_grad)
                linear.bias = child.bias
                setattr(parent, name, linear)
                replaced.append((parent, name, child))

    def undo() -> None:
        for parent, name, child in replaced:
            setattr(parent, name, child)

    return undo


def to_stored(config: PreTrainedConfig, state: dict[str, torch.Tensor], linears: list[str]) -> dict[str, torch.Tensor]:
    """Return a model's state as its family's checkpoints have it.

    Args:
        config: the model's.
        state: by name; of a model after `to_linears_`.
        linears: the names of its blocks' linears.
    """
    family = find_family(config)
    if family.stored_transposed:
        state = state | {f"{name}.weight": state[f"{name}.weight"].T.contiguous() for name in linears}
    return to_fused(state, family.experts) if family.experts else state
