"""What a model makes of its last hidden states: the output embedding and whatever comes after it.

Shapes: B batch, T tokens, D hidden, V vocabulary.
"""

from contextlib import suppress

import torch
from torch import nn

from cbq.models.families import find_family, get_blocks
from cbq.models.loading import PreTrainedModel


class _StopForward(Exception):
    """Ends a forward pass once the head's input is there."""


def last_hidden_states(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the output embedding reads, (B, T, D), the last norm behind it; the head itself does not run.

    Args:
        model: a causal language model.
        tokens: token ids on its device, (B, T).
    """
    captured: list[torch.Tensor] = []

    def stop(head: nn.Module, args: tuple) -> None:
        captured.append(args[0])
        raise _StopForward

    hook = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        with suppress(_StopForward):
            model(input_ids=tokens, use_cache=False)
    finally:
        hook.remove()
    return captured.pop()


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, V) that a model's head makes of hidden states that are given, not computed.

    Args:
        model: a causal language model. What stands behind its output embedding, scales and caps of the logits, is used
            as it is: the model runs, on one token, and the head is handed something else.
        hidden: the last hidden states, (B, T, D), on its device.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: (hidden,))
    path, blocks = find_family(model.config).blocks, get_blocks(model)
    model.set_submodule(path, nn.ModuleList())  # their outputs would not be used
    try:
        return model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device), use_cache=False).logits
    finally:
        model.set_submodule(path, blocks)
        hook.remove()
