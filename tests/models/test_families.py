from pathlib import Path

import pytest
from torch import nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from cbq.errors import InputError
from cbq.models.families import FAMILIES, find_family, get_blocks


def test_blocks_are_the_decoder_layers_in_order(tiny_llama_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    blocks = get_blocks(model)
    assert isinstance(blocks, nn.ModuleList)
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2, 3]


def test_find_family_by_model_type() -> None:
    assert find_family(LlamaConfig()) is FAMILIES[0]


def test_unsupported_architecture_names_the_supported_ones() -> None:
    with pytest.raises(InputError, match=r"'gpt2' is not supported; supported: llama"):
        find_family(GPT2Config())


def test_no_model_type_is_in_two_rows() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
