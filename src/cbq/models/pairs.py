"""Between which modules of a block activations can be scaled: a function an architecture.

Shapes: C channels.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig


@dataclass(frozen=True, eq=False)
class ScalingPair:
    """A module and the linears that read its output, inside one block.

    What the module's output channels are divided by, the linears' input channels can be multiplied by: between them
    lies nothing that a positive factor a channel does not pass through unchanged.

    Args:
        producer: the dotted name of a norm or a linear.
        consumers: the dotted names of all linears that read it, and nothing else does.
        head_dim: channels of an attention head, several of which may read one of the producer's.
        others: what reads it too and is not quantized.
        rows: which of the producer's output rows are the channels, (C,), where it is a fused linear; all if None.
        gain_offset: a norm multiplies by this plus its weight.
    """

    producer: str
    consumers: tuple[str, ...]
    head_dim: int
    others: tuple[str, ...] = ()
    rows: torch.Tensor | None = None
    gain_offset: float = 0.0


Pairs = tuple[ScalingPair, ...]


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
        *(norms if config.do_layer_norm_before and config.layer_norm_elementwise_affine else ()),
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


def mixture(config: PreTrainedConfig) -> Pairs:
    """LLaMA with a mixture of experts; in some blocks there may be one feed-forward."""
    dim, before_mlp = head_dim(config), "post_attention_layernorm"
    experts = [f"mlp.experts.{number}" for number in range(config.num_local_experts)]
    up = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return (
        *separate(config),
        ScalingPair(before_mlp, tuple(f"{expert}.gate_up_proj" for expert in experts), dim, others=("mlp.gate",)),
        *(
            ScalingPair(f"{expert}.gate_up_proj", (f"{expert}.down_proj",), dim, rows=torch.arange(up, 2 * up))
            for expert in experts
        ),
    )
