"""Positions that every device counts in one order."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from cbq.models.families import FAMILIES


def count_positions_(model: PreTrainedModel) -> None:
    """Let a model that adds up floats to number tokens count integers, where a text has no padding.

    Note: CUDA adds up floats in no fixed order, and refuses to under `deterministic=true`.
    """
    paths = {model_type: family.adds_up_positions for family in FAMILIES for model_type in family.model_types}
    if path := paths.get(model.config.model_type):  # models that are only measured may be of no family
        model.get_submodule(path).register_forward_pre_hook(_count, with_kwargs=True)


def _count(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Give a decoder `position_ids` (B, T) where it has neither them nor a mask to find them by."""
    ids = kwargs.get("input_ids")
    if ids is None or kwargs.get("attention_mask") is not None or kwargs.get("position_ids") is not None:
        return args, kwargs
    cache = kwargs.get("past_key_values")
    past = cache.get_seq_length() if cache is not None else 0
    positions = torch.arange(past, past + ids.shape[-1], device=ids.device)
    return args, kwargs | {"position_ids": positions.expand(ids.shape[0], -1)}
