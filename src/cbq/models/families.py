"""The model families that cbq quantizes: a table, one row a family."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cbq.errors import InputError


@dataclass(frozen=True)
class Family:
    """What cbq must know about an architecture.

    Args:
        model_types: the values of `model_type` in config.json that share this architecture.
        blocks: the dotted path from the causal language model to the ModuleList of its blocks.
    """

    model_types: tuple[str, ...]
    blocks: str


FAMILIES = (Family(model_types=("llama",), blocks="model.layers"),)


def find_family(config: PreTrainedConfig) -> Family:
    """Return the row of a model's family.

    Args:
        config: the model's configuration; only its `model_type` is read.

    Raises:
        InputError: no row has this model type.

    Example:
        >>> from transformers import LlamaConfig
        >>> find_family(LlamaConfig()).blocks
        'model.layers'
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    raise InputError(f"model type {config.model_type!r} is not supported; supported: {', '.join(supported_types())}")


def supported_types() -> list[str]:
    """Return every model type of the table.

    Example:
        >>> "llama" in supported_types()
        True
    """
    return [model_type for family in FAMILIES for model_type in family.model_types]


def get_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a causal language model, in order.

    Args:
        model: a model of one of the families.

    Raises:
        InputError: the model is of no family of the table.
    """
    return model.get_submodule(find_family(model.config).blocks)
