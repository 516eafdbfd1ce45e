"""Quantized queries, keys and values (`quant.qkv_bits`): the inputs of attention's two matrix products.

Shapes: B batch, H heads, K key-value heads, T tokens, C channels of a head.
"""

from collections.abc import Iterable

import torch
from torch import nn

from cbq.quant.quantizer import ActQuantizer
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import Quantized, QuantState


class QKVQuantizer(Quantized):
    """Quantizes queries, keys and values, each token of each head by its own range; the softmax stays as it is.

    Args:
        bits: 2 to 8.
        symmetric: no zero point.
        denominator: see `choose_qparams_affine`.

    Source: not in the paper, whose Q(X) is the input of linears. OmniQuant, its baseline, quantizes them (METHOD 19).
    """

    def __init__(self, bits: int, symmetric: bool = False, denominator: float | None = None) -> None:
        super().__init__()
        self.bits, self.symmetric, self.denominator = bits, symmetric, denominator
        self.query = ActQuantizer(bits, symmetric, denominator)
        self.key = ActQuantizer(bits, symmetric, denominator)
        self.value = ActQuantizer(bits, symmetric, denominator)
        self.requires_grad_(False)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return query (B, H, T, C), key and value (B, K, T, C), after their position embedding, quantized."""
        pairs = ((self.query, query), (self.key, key), (self.value, value))
        if self.state is QuantState.NEAREST:
            return tuple(quantizer.nearest(x) for quantizer, x in pairs)
        if self.state is QuantState.LEARNED:
            return tuple(quantizer(x) for quantizer, x in pairs)
        return query, key, value


def quantize_qkv_(attentions: Iterable[nn.Module], scheme: QuantScheme) -> None:
    """Give each attention module its `qkv_quantizer`, in the full-precision state; at 16 bits do nothing."""
    if not scheme.quantizes_qkv:
        return
    for attention in attentions:
        attention.qkv_quantizer = QKVQuantizer(scheme.qkv_bits, scheme.act_symmetric, scheme.act_denominator)


def qkv_quantizers(model: nn.Module) -> list[tuple[str, QKVQuantizer]]:
    """Return every quantizer of queries, keys and values with the qualified name of its attention module."""
    return [
        (name.removesuffix(".qkv_quantizer"), module)
        for name, module in model.named_modules()
        if isinstance(module, QKVQuantizer)
    ]
