"""The hook on attention's inputs, against transformers' own code."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from cbq.models.attention import hook_attention_

TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))


class Coarse(nn.Module):
    """Stands in for a quantizer: to multiples of a half, a third and a quarter."""

    def forward(self, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple((x * steps).round() / steps for x, steps in zip(qkv, (2, 3, 4), strict=True))


@pytest.fixture
def model(tiny_llama_folder: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)


def test_hook_alone_changes_no_bit(model):
    before = model(TOKENS).logits
    padded = torch.ones_like(TOKENS)
    padded[0, :5] = 0
    before_padded = model(TOKENS, attention_mask=padded).logits
    attentions = hook_attention_(model)
    assert [attention.layer_idx for attention in attentions] == [0, 1, 2, 3]
    assert torch.equal(model(TOKENS).logits, before)
    assert torch.equal(model(TOKENS, attention_mask=padded).logits, before_padded)


def test_quantizer_gets_what_attention_gets(model, monkeypatch):
    """transformers' eager attention, its rotary function and its value projection wrapped, computes the same."""
    for attention in hook_attention_(model):
        attention.qkv_quantizer = Coarse()
    hooked = model(TOKENS).logits
    for block in model.model.layers:
        del block.self_attn.qkv_quantizer
    plain = model(TOKENS).logits
    model.set_attn_implementation("eager")
    rotate = modeling_llama.apply_rotary_pos_emb

    def rotate_and_round(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        query, key = rotate(*args, **kwargs)
        return (query * 2).round() / 2, (key * 3).round() / 3

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_round)
    for block in model.model.layers:
        block.self_attn.v_proj.register_forward_hook(lambda module, args, output: (output * 4).round() / 4)
    expected = model(TOKENS).logits
    torch.testing.assert_close(hooked, expected, rtol=1e-3, atol=1e-3)
    assert (hooked - plain).abs().max() > 0.1


def test_generation_with_and_without_a_cache(model):
    for attention in hook_attention_(model):
        attention.qkv_quantizer = Coarse()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(TOKENS[:1, :6], use_cache=True, **options)
    assert torch.equal(cached, model.generate(TOKENS[:1, :6], use_cache=False, **options))
