"""Small models beside plain copies of them, whose weights a reference may change by hand."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from cbq.models.families import get_blocks
from cbq.models.loading import LoadedModel
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_

VOCABULARY = 32


SIZE = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAMA = SIZE | {"intermediate_size": 16, "num_key_value_heads": 1, "initializer_range": 0.4}
OPT = SIZE | {"ffn_dim": 16, "word_embed_proj_dim": 8, "init_std": 0.4, "activation_function": "gelu"}  # no kinks


def tiny_model(dtype: torch.dtype) -> PreTrainedModel:
    """A LLaMA; in float64 an OPT, because LLaMA's norms compute in float32 whatever the model's type."""
    double = dtype == torch.float64
    config = transformers.OPTConfig(**OPT) if double else transformers.LlamaConfig(**LLAMA)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False).to(dtype)


class Pair:
    """A model as cbq has it, and a plain one of the same weights."""

    def __init__(self, scheme: QuantScheme, dtype: torch.dtype = torch.float32):
        self.plain = tiny_model(dtype)
        self.loaded = LoadedModel("tiny", copy.deepcopy(self.plain), None, 16, "x")
        make_quantizable_(self.loaded.model, self.loaded.blocks, scheme)
        generator = torch.Generator().manual_seed(1)
        self.segments = torch.randint(VOCABULARY, (2, 6), generator=generator)

    def linears(self, model: PreTrainedModel) -> dict[str, nn.Linear]:
        return {
            f"blocks.{index}.{name}": module
            for index, block in enumerate(get_blocks(model))
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }


@pytest.fixture
def make_pair():
    return Pair


def nearest(weight: torch.Tensor, bits: int, multiplier: float = 1.0) -> torch.Tensor:
    """Asymmetric round-to-nearest, a row at a time, as a textbook has it; (O, I)."""
    rows = []
    for row in weight.float():
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        scale = (high - low) / (2**bits - 1)
        zero_point = round(-low / scale)
        integers = ((row / (scale * multiplier)).round() + zero_point).clamp(0, 2**bits - 1)
        rows.append((integers - zero_point) * scale * multiplier)
    return torch.stack(rows).to(weight.dtype)


def loss_of(model: PreTrainedModel, segments: torch.Tensor) -> torch.Tensor:
    """The mean over all predicted tokens of -log p, in the model's own precision."""
    logits = model(input_ids=segments).logits[:, :-1]
    return -logits.log_softmax(-1).gather(-1, segments[:, 1:, None]).mean()
