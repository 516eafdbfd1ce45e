"""Scaling channels must not change what a block computes."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbq.models.equivalent import channel_of_input, producer_maxima, scale_channels_
from cbq.models.families import get_blocks, scaling_pairs
from cbq.models.pairs import head_dim

IDS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path):
    """Four query heads share two value heads."""
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.mark.parametrize("index", range(4))
def test_logits_stay_and_activations_do_not(model, index: int) -> None:
    expected = model(IDS).logits
    scaled = copy.deepcopy(model)
    pair = scaling_pairs(model.config, get_blocks(model)[0])[index]
    generator = torch.Generator().manual_seed(1)
    inputs: dict[str, torch.Tensor] = {}
    for name, which in (("before", model), ("after", scaled)):
        block = get_blocks(which)[1]
        if which is scaled:
            channels = block.get_submodule(pair.producer).weight.shape[0]
            channel_scale = torch.rand(channels, generator=generator) * 8 + 0.1
            scale_channels_(pair, block, channel_scale)
        consumer = block.get_submodule(pair.consumers[-1])
        hook = consumer.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
        logits = which(IDS).logits
        hook.remove()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    columns = channel_of_input(channels, consumer.in_features, head_dim(model.config))
    torch.testing.assert_close(inputs["after"] * channel_scale[columns], inputs["before"], rtol=1e-3, atol=1e-4)
    assert (inputs["after"] - inputs["before"]).abs().max() > 0.1


def test_every_linear_of_a_block_reads_a_producer(model) -> None:
    pairs = scaling_pairs(model.config, get_blocks(model)[0])
    linears = [name for name, module in get_blocks(model)[0].named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(name for pair in pairs for name in pair.consumers) == sorted(linears)


def test_maxima_of_a_shared_value_head_are_the_largest_of_its_readers(model) -> None:
    pair = scaling_pairs(model.config, get_blocks(model)[0])[1]
    maxima = torch.arange(64.0)  # four heads of 16: the first two read value head 0
    expected = [max(16 + i, i) for i in range(16)] + [max(32 + i, 48 + i) for i in range(16)]
    assert producer_maxima(pair, get_blocks(model)[0], maxima).tolist() == expected
