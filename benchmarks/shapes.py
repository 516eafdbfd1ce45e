"""The sizes, and a window of random-weight blocks of a size: only as many blocks as the window needs.

Letters: N segments, T tokens, D hidden.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cbq.activations import ActivationCache
from cbq.models.families import get_blocks
from cbq.quant.linear import quantize_linears_
from cbq.quant.rounding import AdaRound, DenseSTE, LoRARounding, LoRASTE, Nearest, Rounding
from cbq.quant.scheme import QuantScheme

VOCAB_SIZE = 256  # blocks never see it
ROUNDINGS: dict[str, type[Rounding]] = {
    "nearest": Nearest,
    "lora_ste": LoRASTE,
    "dense_ste": DenseSTE,
    "lora": LoRARounding,
    "adaround": AdaRound,
}


@dataclass(frozen=True)
class Size:
    """The shape of a LLaMA, and of the work on it.

    Args:
        name: as in `--sizes`.
        hidden: D.
        intermediate: width of the MLP.
        heads: of queries.
        kv_heads: of keys and values.
        tokens: T, of a segment on a CPU.
        device_tokens: T on a GPU.
        steps: window steps a sample; the first is not counted.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tokens: int
    device_tokens: int
    steps: int

    @property
    def kv_width(self) -> int:
        """Channels of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads

    def linear_shapes(self) -> list[tuple[int, int]]:
        """Return (out_features, in_features) of the linears of one block."""
        narrow, wide = self.hidden, self.intermediate
        attention = [(narrow, narrow), (self.kv_width, narrow), (self.kv_width, narrow), (narrow, narrow)]
        return [*attention, (wide, narrow), (wide, narrow), (narrow, wide)]

    def on(self, device: torch.device) -> int:
        """Return T on `device`."""
        return self.device_tokens if device.type == "cuda" else self.tokens


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 32, 64, 2, 1, tokens=8, device_tokens=8, steps=3),  # for --quick: it measures nothing
        Size("pico", 256, 768, 4, 2, tokens=256, device_tokens=256, steps=25),
        Size("1b", 2048, 8192, 32, 8, tokens=512, device_tokens=2048, steps=5),
        Size("7b", 4096, 11008, 32, 32, tokens=512, device_tokens=2048, steps=3),
    )
}


def default_device() -> torch.device:
    """Return the device that cbq itself would choose."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weight_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which cbq holds a LLaMA's weights on `device`."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_model(size: Size, num_blocks: int, tokens: int, device: torch.device) -> LlamaForCausalLM:
    """Return a model of `num_blocks` blocks of a size, with a vocabulary that is next to nothing."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=num_blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, weight_dtype(device))
    return model.eval().requires_grad_(False)


def random_segments(num_segments: int, tokens: int) -> torch.Tensor:
    """Return token ids (N, T)."""
    return torch.randint(VOCAB_SIZE, (num_segments, tokens), generator=torch.Generator().manual_seed(0))


class BlocksOfAWindow:
    """The blocks of one window as cbq sees them, and as plain transformers blocks on the same weights.

    Args:
        size: their shape.
        scheme: of the quantized ones.
        num_segments: N.
        device: where they are.
        num_blocks: in the window.

    Attributes:
        cache: the streams of the quantized blocks.
        plain: blocks whose linears are `nn.Linear`, sharing every parameter with the quantized ones.
    """

    def __init__(
        self, size: Size, scheme: QuantScheme, num_segments: int, device: torch.device, num_blocks: int = 2
    ) -> None:
        tokens = size.on(device)
        model = random_model(size, num_blocks, tokens, device)
        blocks = get_blocks(model)
        self.plain: nn.ModuleList = copy.deepcopy(blocks, {id(tensor): tensor for tensor in blocks.parameters()})
        quantize_linears_(blocks, scheme)
        self.cache = ActivationCache(model, blocks, random_segments(num_segments, tokens))
