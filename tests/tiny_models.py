"""A small model of every family and of its variants, built from a configuration: one row each.

Norms have random gains and biases, and linears random biases: what is easy to get wrong shows.
"""

import torch
import transformers
from transformers import PreTrainedModel

from cbq.models.equivalent import scale_channels_
from cbq.models.families import get_blocks, scaling_pairs

VOCABULARY = 320
OUTLIER = 3  # which channel
SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_GROUPS = {key: value for key, value in SIZE.items() if key != "num_key_value_heads"}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 4, "n_head": 4, "pad_token_id": 0}
FALCON = {key: value for key, value in NO_GROUPS.items() if key != "intermediate_size"} | {"bias": True}
GEMMA = SIZE | {"head_dim": 16}
OPT = {key: value for key, value in NO_GROUPS.items() if key != "intermediate_size"} | {
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 128}

# Name -> configuration class and what it is made with.
TINY: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", SIZE),
    "mistral": ("MistralConfig", SIZE),
    "qwen2": ("Qwen2Config", SIZE),
    "qwen3": ("Qwen3Config", SIZE | {"head_dim": 32}),
    "gemma": ("GemmaConfig", GEMMA),
    "gemma2": ("Gemma2Config", GEMMA | {"sliding_window": 16}),
    "gemma3_text": ("Gemma3TextConfig", GEMMA | {"sliding_window": 16, "sliding_window_pattern": 2}),
    "phi": ("PhiConfig", SIZE),
    "phi3": ("Phi3Config", SIZE),
    "opt": ("OPTConfig", OPT),
    "opt-norm-after": ("OPTConfig", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-no-gains": ("OPTConfig", OPT | {"layer_norm_elementwise_affine": False}),
    "opt-gelu": ("OPTConfig", OPT | {"activation_function": "gelu"}),
    "bloom": ("BloomConfig", BLOOM),
    "bloom-norm-in-residual": ("BloomConfig", BLOOM | {"apply_residual_connection_post_layernorm": True}),
    "gpt_neox": ("GPTNeoXConfig", NO_GROUPS),
    "gpt_neox-serial": ("GPTNeoXConfig", NO_GROUPS | {"use_parallel_residual": False}),
    "falcon": ("FalconConfig", FALCON),
    "falcon-groups": ("FalconConfig", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": (
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-alibi": ("FalconConfig", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "gpt2": ("GPT2Config", GPT2),
    "mixtral": ("MixtralConfig", SIZE | {"num_local_experts": 4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SIZE
        | {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
}


def tiny_model(name: str) -> PreTrainedModel:
    """Return the small model of a `name` out of `TINY`, in evaluation mode and float32."""
    kind, options = TINY[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options), dtype=torch.float32)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in get_blocks(model).parameters():
        if parameter.dim() == 1:  # gains and biases: 1 or 0 until now
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.mul_(4)  # a block that does something
    return model


def add_outliers_(model: PreTrainedModel, factor: float) -> None:
    """Make one channel between every producer and its consumers larger; the model computes what it did."""
    for block in get_blocks(model):
        for pair in scaling_pairs(model.config, block):
            weight = block.get_submodule(pair.producer).weight
            scale = torch.ones(len(weight) if pair.rows is None else len(pair.rows))
            scale[OUTLIER] = 1 / factor
            scale_channels_(pair, block, scale)


def token_ids(num_segments: int = 6, num_tokens: int = 32) -> torch.Tensor:
    """Return token ids, (num_segments, num_tokens)."""
    return torch.randint(3, VOCABULARY, (num_segments, num_tokens), generator=torch.Generator().manual_seed(2))
