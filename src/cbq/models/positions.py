"""Positions that every device counts in one order."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def count_positions_(model: PreTrainedModel) -> None:
    """Let an OPT number the tokens of texts without padding by integers; any other model is left as it is.

    Note: transformers' own adds up a row of 1.0, which CUDA does in no fixed order and refuses to under
        `deterministic=true`.
    """
    if model.config.model_type == "opt":
        model.get_submodule("model.decoder").register_forward_pre_hook(_count, with_kwargs=True)


def _count(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Give a decoder `position_ids` (B, T) where it has neither them nor a mask to find them by."""
    ids = kwargs.get("input_ids")
    if ids is None or kwargs.get("attention_mask") is not None or kwargs.get("position_ids") is not None:
        return args, kwargs
    cache = kwargs.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    positions = torch.arange(past, past + ids.shape[-1], device=ids.device)
    return args, kwargs | {"position_ids": positions.expand(ids.shape[0], -1)}
