"""The model families that cbq quantizes: a table, one row a family."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cbq.errors import InputError


@dataclass(frozen=True)
class ScalingPair:
    """A module and the linears that read its output, inside one block.

    What the module's output channels are divided by, the linears' input channels can be multiplied by: between them
    lies nothing that a factor a channel does not pass through unchanged.

    Args:
        producer: the dotted name of a norm or a linear.
        consumers: the dotted names of all linears that read it, and nothing else does.
    """

    producer: str
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """What cbq must know about an architecture.

    Args:
        model_types: the values of `model_type` in config.json that share this architecture.
        blocks: the dotted path from the causal language model to the ModuleList of its blocks.
        attention: the dotted name of a block's attention module, which calls transformers' attention interface.
        scaling_pairs: where activations of a block can be scaled without changing what it computes.
    """

    model_types: tuple[str, ...]
    blocks: str
    attention: str
    scaling_pairs: tuple[ScalingPair, ...]


FAMILIES = (
    Family(
        model_types=("llama",),
        blocks="model.layers",
        attention="self_attn",
        scaling_pairs=(
            ScalingPair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ScalingPair("self_attn.v_proj", ("self_attn.o_proj",)),
            ScalingPair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ScalingPair("mlp.up_proj", ("mlp.down_proj",)),
        ),
    ),
)


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


def head_dim(config: PreTrainedConfig) -> int:
    """Return the channels of one attention head.

    Example:
        >>> from transformers import LlamaConfig
        >>> head_dim(LlamaConfig(hidden_size=64, num_attention_heads=4))
        16
    """
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def get_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a causal language model, in order.

    Args:
        model: a model of one of the families.

    Raises:
        InputError: the model is of no family of the table.
    """
    return model.get_submodule(find_family(model.config).blocks)
