"""A model made ready for quantization."""

from pathlib import Path

import pytest
import torch

from cbq.errors import InputError
from cbq.models.loading import load_pretrained
from cbq.quant.attention import QKVQuantizer
from cbq.quant.linear import QuantLinear
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state, quantized_modules
from cbq.quantized import make_quantizable_

TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("label", "attentions"), [("w4a4", 0), ("w4a4-qkv4", 4), ("w16a16-qkv3", 4)])
def test_full_precision_until_asked(tiny_llama_folder: Path, label: str, attentions: int) -> None:
    loaded = load_pretrained(str(tiny_llama_folder))
    before = loaded.model(TOKENS).logits
    make_quantizable_(loaded.model, loaded.blocks, QuantScheme.parse(label))
    assert torch.equal(loaded.model(TOKENS).logits, before)
    kinds = [type(module) for module in quantized_modules(loaded.model)]
    assert kinds.count(QuantLinear) == 4 * 7
    assert kinds.count(QKVQuantizer) == attentions
    with quant_state(loaded.model, QuantState.NEAREST):
        assert not torch.equal(loaded.model(TOKENS).logits, before)
    assert torch.equal(loaded.model(TOKENS).logits, before)


def test_a_scheme_that_does_not_fit_changes_nothing(tiny_llama_folder: Path) -> None:
    loaded = load_pretrained(str(tiny_llama_folder))
    implementation = loaded.model.config._attn_implementation
    with pytest.raises(InputError, match="group_size"):
        make_quantizable_(loaded.model, loaded.blocks, QuantScheme(4, 4, group_size=7, qkv_bits=4))
    assert not quantized_modules(loaded.model)
    assert loaded.model.config._attn_implementation == implementation
