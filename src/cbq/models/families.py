"""The model families that cbq quantizes: a table, one row a family.

A row says where the blocks are and which of their activations can be scaled; what differs inside a family is decided by
its configuration. Adding a family is one row here and one in `tests/tiny_models.py`.

Shapes: C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cbq.errors import InputError


@dataclass(frozen=True, eq=False)
class ScalingPair:
    """A module and the linears that read its output, inside one block.

    What the module's output channels are divided by, the linears' input channels can be multiplied by: between them
    lies nothing that a positive factor a channel does not pass through unchanged.

    Args:
        producer: the dotted name of a norm or a linear.
        consumers: the dotted names of all linears that read it, and nothing else does.
        head_dim: channels of an attention head, several of which may read one of the producer's.
        rows: which of the producer's output rows are the channels, (C,), where it is a fused linear; all if None.
        gain_offset: a norm multiplies by this plus its weight.
    """

    producer: str
    consumers: tuple[str, ...]
    head_dim: int
    rows: torch.Tensor | None = None
    gain_offset: float = 0.0


Pairs = tuple[ScalingPair, ...]


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
    """

    model_types: tuple[str, ...]
    blocks: str
    scaling_pairs: Callable[[PreTrainedConfig], Pairs]
    attention: str | None = None
    gain_offset: float = 0.0
    calls_by_batch: bool = False
    stored_transposed: bool = False


def head_dim(config: PreTrainedConfig) -> int:
    """Return the channels of one attention head.

    Example:
        >>> from transformers import LlamaConfig
        >>> head_dim(LlamaConfig(hidden_size=64, num_attention_heads=4))
        16
    """
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def separate(config: PreTrainedConfig, before_mlp: str = "post_attention_layernorm", gain_offset: float = 0.0) -> Pairs:
    """A norm before attention, one before a gated feed-forward, and no linear fused: LLaMA."""
    dim = head_dim(config)
    return (
        ScalingPair("input_layernorm", QKV, dim, gain_offset=gain_offset),
        ScalingPair("self_attn.v_proj", ("self_attn.o_proj",), dim),
        ScalingPair(before_mlp, ("mlp.gate_proj", "mlp.up_proj"), dim, gain_offset=gain_offset),
        ScalingPair("mlp.up_proj", ("mlp.down_proj",), dim),
    )


def phi(config: PreTrainedConfig) -> Pairs:
    """One norm before attention and feed-forward, which run beside each other."""
    dim = head_dim(config)
    return (
        ScalingPair("input_layernorm", (*QKV, "mlp.fc1"), dim),
        ScalingPair("self_attn.v_proj", ("self_attn.dense",), dim),
    )


def phi3(config: PreTrainedConfig) -> Pairs:
    """LLaMA with queries, keys and values in one linear, and gate and up in another."""
    dim = head_dim(config)
    values = dim * (config.num_attention_heads + config.num_key_value_heads)
    up = config.intermediate_size
    return (
        ScalingPair("input_layernorm", ("self_attn.qkv_proj",), dim),
        ScalingPair(
            "self_attn.qkv_proj",
            ("self_attn.o_proj",),
            dim,
            rows=torch.arange(values, values + dim * config.num_key_value_heads),
        ),
        ScalingPair("post_attention_layernorm", ("mlp.gate_up_proj",), dim),
        ScalingPair("mlp.gate_up_proj", ("mlp.down_proj",), dim, rows=torch.arange(up, 2 * up)),
    )


def opt(config: PreTrainedConfig) -> Pairs:
    """Norms before attention and feed-forward, or, in one size, at the residual's end; ReLU between fc1 and fc2."""
    dim = head_dim(config)
    norms = (
        ScalingPair("self_attn_layer_norm", QKV, dim),
        ScalingPair("final_layer_norm", ("fc1",), dim),
    )
    relu = (ScalingPair("fc1", ("fc2",), dim),)
    return (
        *(norms if config.do_layer_norm_before else ()),
        ScalingPair("self_attn.v_proj", ("self_attn.out_proj",), dim),
        *(relu if config.activation_function == "relu" else ()),
    )


def interleaved_values(config: PreTrainedConfig) -> torch.Tensor:
    """Return the rows of the values in a linear that has query, key and value of each head one after the other.

    Example:
        >>> from transformers import BloomConfig
        >>> interleaved_values(BloomConfig(hidden_size=4, n_head=2)).tolist()
        [4, 5, 10, 11]
    """
    heads, dim = config.num_attention_heads, head_dim(config)
    return torch.arange(3 * heads * dim).view(heads, 3, dim)[:, 2].flatten()


def bloom(config: PreTrainedConfig) -> Pairs:
    """One fused linear for queries, keys and values; norms that are not on the residual's way."""
    dim = head_dim(config)
    norms = (
        ScalingPair("input_layernorm", ("self_attention.query_key_value",), dim),
        ScalingPair("post_attention_layernorm", ("mlp.dense_h_to_4h",), dim),
    )
    return (
        *(() if config.apply_residual_connection_post_layernorm else norms),
        ScalingPair("self_attention.query_key_value", ("self_attention.dense",), dim, rows=interleaved_values(config)),
    )


def gpt_neox(config: PreTrainedConfig) -> Pairs:
    """As BLOOM; whether both halves run beside each other makes no difference, for each has its norm."""
    dim = head_dim(config)
    return (
        ScalingPair("input_layernorm", ("attention.query_key_value",), dim),
        ScalingPair("attention.query_key_value", ("attention.dense",), dim, rows=interleaved_values(config)),
        ScalingPair("post_attention_layernorm", ("mlp.dense_h_to_4h",), dim),
    )


def falcon(config: PreTrainedConfig) -> Pairs:
    """One or two norms, by configuration, and values of all heads, of groups of them, or of one."""
    dim, heads = head_dim(config), config.num_attention_heads
    qkv, up = "self_attention.query_key_value", "mlp.dense_h_to_4h"
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        each = heads // groups + 2
        values = torch.arange(groups * each * dim).view(groups, each, dim)[:, -1].flatten()
    elif config.multi_query:
        values = torch.arange((heads + 1) * dim, (heads + 2) * dim)
    else:
        values = interleaved_values(config)
    if config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2):
        norms = (ScalingPair("ln_attn", (qkv,), dim), ScalingPair("ln_mlp", (up,), dim))
    elif config.parallel_attn:
        norms = (ScalingPair("input_layernorm", (qkv, up), dim),)
    else:
        norms = (ScalingPair("input_layernorm", (qkv,), dim), ScalingPair("post_attention_layernorm", (up,), dim))
    return (*norms, ScalingPair(qkv, ("self_attention.dense",), dim, rows=values))


def gpt2(config: PreTrainedConfig) -> Pairs:
    """Queries, keys and values in one linear, one after the other."""
    dim, hidden = head_dim(config), config.hidden_size
    return (
        ScalingPair("ln_1", ("attn.c_attn",), dim),
        ScalingPair("attn.c_attn", ("attn.c_proj",), dim, rows=torch.arange(2 * hidden, 3 * hidden)),
        ScalingPair("ln_2", ("mlp.c_fc",), dim),
    )


FAMILIES = (
    Family(("llama", "mistral", "qwen2", "qwen3"), "model.layers", separate, attention="self_attn"),
    Family(("gemma",), "model.layers", partial(separate, gain_offset=1.0), attention="self_attn", gain_offset=1.0),
    Family(
        ("gemma2", "gemma3_text"),  # gemma2 caps its attention's logits, which only its own attention does
        "model.layers",
        partial(separate, before_mlp="pre_feedforward_layernorm", gain_offset=1.0),
        gain_offset=1.0,
    ),
    Family(("phi",), "model.layers", phi, attention="self_attn"),
    Family(("phi3",), "model.layers", phi3, attention="self_attn"),
    Family(("opt",), "model.decoder.layers", opt, attention="self_attn"),
    Family(("bloom",), "transformer.h", bloom, calls_by_batch=True),
    Family(("gpt_neox",), "gpt_neox.layers", gpt_neox, attention="attention"),
    Family(("falcon",), "transformer.h", falcon, calls_by_batch=True),
    Family(("gpt2",), "transformer.h", gpt2, attention="attn", stored_transposed=True),
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


def scaling_pairs(config: PreTrainedConfig) -> Pairs:
    """Return where activations of a model's blocks can be scaled without changing what it computes.

    Raises:
        InputError: no row has the configuration's model type.
    """
    return find_family(config).scaling_pairs(config)


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
