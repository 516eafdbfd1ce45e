"""The formula against what autograd and a window really hold."""

from dataclasses import replace

import pytest
import torch

from benchmarks import memory
from benchmarks.memory import Work, formula, kept_bytes_per_token, kept_bytes_per_weight, learned_numbers, shortage
from benchmarks.shapes import SIZES, BlocksOfAWindow, random_model
from benchmarks.steps import WindowSteps
from cbq.quant.linear import quant_linears
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates, WindowModule
from cbq.reconstruction.windows import Window

CPU = torch.device("cpu")
# No two widths are the same, and the tokens are none of them.
SIZE = replace(SIZES["tiny"], hidden=64, intermediate=160, heads=4, kv_heads=2, tokens=101)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
def test_kept_activations_are_what_autograd_keeps(scheme):
    """Of a block whose input needs a gradient, as that of a window's second one does."""
    blocks = BlocksOfAWindow(SIZE, QuantScheme.parse(scheme), 1, CPU, num_blocks=1)
    for linear in quant_linears(list(blocks.cache.blocks)):
        linear.state = QuantState.LEARNED
        linear.weight_quantizer.step_size.multiplier.requires_grad_(True)
        if linear.act_quantizer:
            linear.act_quantizer.range_multiplier.requires_grad_(True)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = blocks.cache.quantized[:].clone().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        blocks.cache.run_blocks(0, 1, hidden)
    of_tokens = [t for t in kept.values() if SIZE.tokens in t.shape]
    measured = sum(t.untyped_storage().nbytes() for t in of_tokens) / SIZE.tokens
    expected = kept_bytes_per_token(Work(SIZE, scheme, "nearest", 1, SIZE.tokens, window=1), CPU) - 4 * 3 * SIZE.hidden
    assert measured == pytest.approx(expected, rel=0.04)  # scales of tokens, rotary embeddings


@pytest.mark.parametrize("rounding", ["nearest", "lora_ste", "dense_ste", "adaround"])
def test_learned_numbers_are_those_of_a_window(rounding):
    steps = WindowSteps(Work(SIZE, "w4a4", rounding, 2, SIZE.tokens), CPU)
    module = WindowModule(Window(0, 2, 0, 2), steps.cache, ReconstructionLoss(), 1.0, LearningRates())
    assert sum(p.numel() for p in module.learned) == 2 * learned_numbers(SIZE, rounding)


def test_weights_and_streams():
    work = Work(SIZE, "w4a4", "lora_ste", segments=3, tokens=SIZE.tokens, blocks=2)
    model = random_model(SIZE, 2, SIZE.tokens, CPU)
    terms = formula(work, CPU)
    assert terms["weights"] == sum(p.numel() * 4 for p in model.parameters())
    assert terms["streams"] == 2 * 3 * SIZE.tokens * SIZE.hidden * 4
    assert formula(replace(work, blocks=4), CPU) == terms | {
        "weights": formula(replace(work, blocks=4), CPU)["weights"]
    }


def test_the_step_grows_with_the_window():
    work = Work(SIZES["1b"], "w4a4", "dense_ste", segments=4, tokens=512, blocks=8, window=1)
    one, two = (formula(replace(work, window=window), CPU) for window in (1, 2))
    assert two["learned"] == 2 * one["learned"]
    assert 1.5 * one["step"] < two["step"] < 2 * one["step"]


def test_a_quantized_weight_is_kept_for_the_backward():
    kept = kept_bytes_per_weight("nearest", CPU)
    assert 4 <= kept <= 16.5  # at least what the linear multiplies with; the plain chain keeps three


def test_shortage_says_why(monkeypatch):
    work = Work(SIZES["7b"], "w4a4", "lora_ste", 2, 512)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200 * memory.GIB)
    assert shortage(work, CPU) is None
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2 * memory.GIB)
    assert shortage(work, CPU).endswith("2.0 GiB are free")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # where nobody says, we try
    assert shortage(work, CPU) is None


def test_work_reaches_the_probe_whole():
    work = Work(SIZE, "w4a4", "lora", 3, 7, blocks=5, window=3, overlap=1, epochs=2)
    assert Work.from_json(work.to_json()) == work


@pytest.mark.slow
def test_probe_in_a_process_of_its_own():
    """A dense rounding's parameters, gradients and moments are most of what the window needs."""
    work = Work(replace(SIZES["pico"], hidden=1024, intermediate=2048, heads=16), "w4a16", "dense_ste", 2, 32)
    measured, terms = memory.probe(work), formula(work, CPU)
    assert measured["loaded_bytes"] == pytest.approx(terms["weights"], rel=0.2)
    assert sum(terms.values()) < measured["peak_bytes"] < 1.7 * sum(terms.values())
