"""The model families that cbq quantizes: a table, one row a family.

A row says where the blocks are and which of their activations can be scaled; what differs inside a family is decided by
its configuration. Adding a family is one row here and one in `tests/tiny_models.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cbq.errors import InputError
from cbq.models import pairs
from cbq.models.pairs import Pairs


@dataclass(frozen=True)
class Family:
    """What cbq must know about an architecture.

    Args:
        model_types: the values of `model_type` in config.json that share this architecture.
        blocks: the dotted path from the causal language model to the ModuleList of its blocks.
        scaling_pairs: returns, for a configuration, where activations of a block can be scaled without changing what it
            computes.
        attention: the dotted name of a block's attention module, where that calls transformers' attention interface and
            needs nothing of its own; None: its queries, keys and values cannot be quantized.
        gain_offset: norms multiply by this plus their weight.
        calls_by_batch: what the model passes to its blocks besides hidden states depends on the number of segments.
        stored_transposed: checkpoints have the weights of the blocks' linears as (in, out).
        experts: the dotted name of a block's mixture of experts, if it has one.
        flattens_tokens: its feed-forward sees the tokens of a batch in one dimension.
        adds_up_positions: the dotted name of a module that numbers tokens by a running sum of floats, if there is one.
        excluded: parameters of a block with two or more dimensions that stay as they are, each with the reason.
    """

    model_types: tuple[str, ...]
    blocks: str
    scaling_pairs: Callable[[PreTrainedConfig], Pairs]
    attention: str | None = None
    gain_offset: float = 0.0
    calls_by_batch: bool = False
    stored_transposed: bool = False
    experts: str | None = None
    flattens_tokens: bool = False
    adds_up_positions: str | None = None
    excluded: tuple[tuple[str, str], ...] = ()


ROUTER = ("mlp.gate.weight", "the router: small, and an error in it sends tokens to other experts")

GEMMA = partial(pairs.separate, gain_offset=1.0)
GEMMA_2 = partial(pairs.separate, before_mlp="pre_feedforward_layernorm", gain_offset=1.0)

FAMILIES = (
    Family(("llama", "mistral", "qwen2", "qwen3"), "model.layers", pairs.separate, attention="self_attn"),
    Family(
        ("gemma",), "model.layers", partial(pairs.separate, gain_offset=1.0), attention="self_attn", gain_offset=1.0
    ),
    Family(("gemma2",), "model.layers", GEMMA_2, gain_offset=1.0),  # its attention caps logits: no other does
    Family(("gemma3_text",), "model.layers", GEMMA_2, attention="self_attn", gain_offset=1.0),
    Family(("phi",), "model.layers", pairs.phi, attention="self_attn"),
    Family(("phi3",), "model.layers", pairs.phi3, attention="self_attn"),
    Family(
        ("opt",),
        "model.decoder.layers",
        pairs.opt,
        attention="self_attn",
        flattens_tokens=True,
        adds_up_positions="model.decoder",
    ),
    Family(("bloom",), "transformer.h", pairs.bloom, calls_by_batch=True),
    Family(("gpt_neox",), "gpt_neox.layers", pairs.gpt_neox, attention="attention"),
    Family(("falcon",), "transformer.h", pairs.falcon, calls_by_batch=True),
    Family(
        ("mixtral", "qwen3_moe"),
        "model.layers",
        pairs.mixture,
        attention="self_attn",
        experts="mlp.experts",
        excluded=(ROUTER,),
    ),
    Family(("gpt2",), "transformer.h", pairs.gpt2, attention="attn", stored_transposed=True),
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


def scaling_pairs(config: PreTrainedConfig, block: nn.Module) -> Pairs:
    """Return where activations of a block can be scaled without changing what it computes.

    Args:
        config: the model's.
        block: after `to_linears_`. Blocks of one model may differ.

    Raises:
        InputError: no row has the configuration's model type.
    """
    names = {name for name, _ in block.named_modules()}
    found = find_family(config).scaling_pairs(config)
    return tuple(pair for pair in found if names.issuperset((pair.producer, *pair.consumers, *pair.others)))


def context(config: PreTrainedConfig) -> int:
    """Return the most tokens that a model was made for.

    Example:
        >>> from transformers import BloomConfig
        >>> context(BloomConfig())  # no positions, so that any number works: what its tokenizer and its authors say
        2048
    """
    return getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None) or 2048


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
