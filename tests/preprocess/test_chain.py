"""Steps of preprocessing, one after the other."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.preprocess.chain import Chain
from cbq.preprocess.clipping import SmallestError
from cbq.preprocess.scaling import SmoothQuant
from cbq.quant.linear import quantize_linears_
from cbq.quant.scheme import QuantScheme

SEGMENTS = torch.randint(320, (4, 24), generator=torch.Generator().manual_seed(0))


def test_a_chain_is_its_steps_in_order(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)
    quantize_linears_(get_blocks(model), QuantScheme(4, 4))
    other, wrong_order = copy.deepcopy(model), copy.deepcopy(model)
    steps = {"scale": SmoothQuant(0.5), "clip": SmallestError(activations=False)}
    Chain(steps).apply_(model, get_blocks(model), SEGMENTS)
    for step in steps.values():
        step.apply_(other, get_blocks(other), SEGMENTS)
    Chain(dict(reversed(steps.items()))).apply_(wrong_order, get_blocks(wrong_order), SEGMENTS)
    mine, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(mine[name], tensor) for name, tensor in wrong_order.state_dict().items())


def test_a_chain_refuses_what_a_step_refuses(tiny_llama_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    quantize_linears_(get_blocks(model), QuantScheme(4, 4, engine_activations=True))
    Chain({"scale": SmoothQuant(), "clip": SmallestError(activations=False)}).check(get_blocks(model))
    with pytest.raises(InputError, match=r"preprocess\.activations must be false"):
        Chain({"scale": SmoothQuant(), "clip": SmallestError()}).check(get_blocks(model))


def test_no_steps() -> None:
    with pytest.raises(InputError, match="at least one step"):
        Chain({})


def test_what_is_no_step() -> None:
    with pytest.raises(InputError, match="must be a step of preprocessing, got None"):
        Chain({"scale": SmoothQuant(), "clip": None})
