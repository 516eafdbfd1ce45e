"""A hook on the inputs of attention: queries, keys and values after their position embedding.

transformers calls a registered function with the attention module and the three tensors; ours passes the tensors
through the module's `qkv_quantizer`, where it has one, and goes on with PyTorch's scaled dot product attention.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cbq.errors import InputError
from cbq.models.families import find_family, get_blocks

IMPLEMENTATION = "cbq_sdpa"


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: object, **kwargs: object
) -> tuple[torch.Tensor, None]:
    """Return the attention output of query, key and value (batch, heads, tokens, channels), each first quantized."""
    quantizer = getattr(module, "qkv_quantizer", None)
    if quantizer is not None:
        query, key, value = quantizer(query, key, value)
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def check_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention does not call transformers' attention interface.

    Raises:
        InputError: it does not.
    """
    if find_family(model.config).attention is None:
        raise InputError(
            f"quant.qkv_bits must be 16 for model type {model.config.model_type!r}: its attention is its own"
        )


def hook_attention_(model: PreTrainedModel) -> list[nn.Module]:
    """Make every attention module of the blocks pass its inputs through its `qkv_quantizer`, once it has one.

    Args:
        model: one that `check_attention` takes. Its attention becomes PyTorch's scaled dot product, whichever it was.

    Returns:
        the attention module of each block.
    """
    model.set_attn_implementation(IMPLEMENTATION)
    assert model.config._attn_implementation == IMPLEMENTATION, "a family whose attention cannot be replaced"
    return [block.get_submodule(find_family(model.config).attention) for block in get_blocks(model)]
