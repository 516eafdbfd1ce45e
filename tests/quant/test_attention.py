"""Quantized queries, keys and values."""

import pytest
import torch
from torch import nn

from cbq.quant.attention import QKVQuantizer, quantize_qkv_
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState


def quantize_one(row: torch.Tensor, bits: int) -> torch.Tensor:
    """Return one token of one head on its own asymmetric grid, which holds 0, by torch's operator."""
    low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
    scale = (high - low) / (2**bits - 1)
    return torch.fake_quantize_per_tensor_affine(row, scale, round(-low / scale), 0, 2**bits - 1)


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4 query heads, 2 key-value heads, 5 tokens, 8 channels; every token of every head of another size."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(2, heads, 5, 8, generator=generator) * torch.rand(2, heads, 5, 1, generator=generator) * 10
        for heads in (4, 2, 2)
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_each_token_of_each_head_has_its_own_range(qkv, bits):
    quantizer = QKVQuantizer(bits)
    quantizer.state = QuantState.NEAREST
    for x, quantized in zip(qkv, quantizer(*qkv), strict=True):
        expected = torch.stack([quantize_one(row, bits) for row in x.flatten(0, 2)]).view_as(x)
        torch.testing.assert_close(quantized, expected)
        assert not torch.equal(quantized, x)


def test_states(qkv):
    quantizer = QKVQuantizer(4)
    for x, same in zip(qkv, quantizer(*qkv), strict=True):
        assert same is x
    quantizer.state = QuantState.LEARNED
    learned = quantizer(*qkv)
    quantizer.state = QuantState.NEAREST
    assert all(torch.equal(a, b) for a, b in zip(learned, quantizer(*qkv), strict=True)), "multipliers start at 1"
    nn.init.constant_(quantizer.key.range_multiplier, 0.8)
    quantizer.state = QuantState.LEARNED
    changed = [not torch.equal(a, b) for a, b in zip(learned, quantizer(*qkv), strict=True)]
    assert changed == [False, True, False]


def test_options_are_those_of_activations(qkv):
    attention = nn.Module()
    quantize_qkv_([attention], QuantScheme(4, 8, act_symmetric=True, act_denominator=127.0, qkv_bits=8))
    quantizer = attention.qkv_quantizer
    assert (quantizer.bits, quantizer.symmetric, quantizer.denominator) == (8, True, 127.0)
    quantizer.state = QuantState.NEAREST
    scale = qkv[0].abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(quantizer(*qkv)[0], (qkv[0] / scale).round() * scale)


def test_16_bits_put_nothing_in():
    attention = nn.Module()
    quantize_qkv_([attention], QuantScheme(4, 4))
    assert not hasattr(attention, "qkv_quantizer")
