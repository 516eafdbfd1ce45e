"""Blocks in host memory: who comes and goes when. There is no second device here; `tests/test_box.py` has one."""

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny_models import tiny_model, token_ids
from torch import nn

from cbq.errors import InputError
from cbq.evaluation.agreement import compare, remember
from cbq.models.families import get_blocks
from cbq.models.offload import HOST, OffloadedBlock, lent, moved, offload_
from cbq.placement import RESIDENT_SHARE, check_fits, check_offload, model_bytes, place_
from cbq.preprocess.cfp import CoarseToFine
from cbq.preprocess.statistics import expert_tokens
from cbq.quant.linear import fuse_linears_
from cbq.quant.rounding import DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.module import LearningRates
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.windows import SlidingWindows

GPU = torch.device("cuda")


class Journal:
    """What is done to tensors that are sent somewhere, in place of a device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[torch.device] = []
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: self.send(tensor, device))

    def send(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.sent.append(device)
        return tensor.clone()


def test_a_lent_block_is_a_copy_that_is_forgotten(monkeypatch):
    """What was in host memory is there again, the very same memory; nothing is sent back."""
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    offloaded = OffloadedBlock(block, GPU)
    before = {name: tensor.data_ptr() for name, tensor in block.state_dict().items()}
    parameters = list(block.parameters())
    values = [tensor.clone() for tensor in parameters]
    journal = Journal(monkeypatch)
    with offloaded.lent(), offloaded.lent(), offloaded.moved():  # the first one decides
        inside = {name: tensor.data_ptr() for name, tensor in block.state_dict().items()}
        assert not set(inside.values()) & set(before.values())
        assert offloaded.on_device
    assert journal.sent == [GPU] * len(before)
    assert {name: tensor.data_ptr() for name, tensor in block.state_dict().items()} == before
    assert [id(tensor) for tensor in block.parameters()] == [id(tensor) for tensor in parameters]
    assert all(torch.equal(a, b) for a, b in zip(parameters, values, strict=True))
    assert not offloaded.on_device


def test_a_block_is_lent_for_its_forward_and_given_back_after_an_error(monkeypatch):
    block = nn.Sequential(nn.Linear(3, 3))
    offloaded = OffloadedBlock(block, GPU)
    journal = Journal(monkeypatch)
    weight = block[0].weight.data_ptr()
    seen = []
    block[0].register_forward_pre_hook(lambda module, args: seen.append(module.weight.data_ptr()))
    block(torch.ones(1, 3))
    assert seen[0] != weight
    with pytest.raises(RuntimeError, match="mat1"):
        block(torch.ones(1, 2))
    assert block[0].weight.data_ptr() == weight
    assert not offloaded.on_device
    assert journal.sent == [GPU] * 4


def test_a_moved_block_comes_back_with_what_it_became(monkeypatch):
    block = nn.Sequential(nn.Linear(3, 3))
    OffloadedBlock(block, GPU)
    calls = []
    monkeypatch.setattr(block, "to", lambda device: calls.append(device))
    with moved([block, nn.Linear(2, 2)]):
        assert calls == [GPU]
        block[0] = nn.Linear(3, 1)
        assert block(torch.ones(1, 3)).shape == (1, 1)
        assert calls == [GPU], "it was there already"
    assert calls == [GPU, HOST]
    assert block[0].out_features == 1


def test_what_is_around_the_blocks_is_sent_once(monkeypatch):
    """Tied embeddings as one; the model's device is then the device."""
    model = tiny_model("gemma")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    blocks = get_blocks(model)
    outside = [*model.model.embed_tokens.parameters(), *model.model.norm.parameters(), *model.model.buffers()]
    journal = Journal(monkeypatch)
    offload_(model, blocks, GPU)
    assert len(journal.sent) == len({id(tensor) for tensor in outside})
    assert all(isinstance(block.offloaded, OffloadedBlock) for block in blocks)


def test_a_copied_model_computes_with_its_own_blocks():
    model = tiny_model("llama")
    offload_(model, get_blocks(model), HOST)
    other = copy.deepcopy(model)
    tokens = token_ids(1, 8)
    before = model(input_ids=tokens).logits
    for parameter in get_blocks(other).parameters():
        parameter.zero_()
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert not torch.equal(other(input_ids=tokens).logits, before)


def quantize(name: str, offload: bool) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Return a quantized model's state, and which blocks were on the device each time that a module of one ran."""
    model, tokens, there = tiny_model(name), token_ids(2, 8), []
    blocks = get_blocks(model)
    make_quantizable_(model, blocks, QuantScheme(4, 4))
    if offload:
        offload_(model, blocks, HOST)

        def look(index: int) -> None:
            there.append([number for number, block in enumerate(blocks) if block.offloaded.on_device])
            assert index in there[-1]

        for index, block in enumerate(blocks):
            for child in block.children():
                child.register_forward_pre_hook(lambda module, args, index=index: look(index))
    reference = remember(model, blocks, tokens)
    expert_tokens(model, blocks, tokens)
    CoarseToFine(weights=True, activations=True).apply_(model, blocks, tokens)
    assert max(map(len, there), default=1) == 1
    solver = Reconstruction(ReconstructionLoss(), DenseSTE, LearningRates(), epochs=1, batch_size=2)
    reconstruct_(model, blocks, tokens, SlidingWindows(2, 1).plan(4), solver, [], lambda result: None)
    assert max(map(len, there), default=2) == 2
    there.clear()
    compare(model, blocks, reference)
    assert max(map(len, there), default=1) == 1
    return model.state_dict(), there


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_no_more_than_a_window_is_on_the_device(name):
    """One block at a time for statistics and evaluation, and the result is the same to the bit."""
    state, there = quantize(name, offload=True)
    assert there, "nothing was looked at"
    expected, _ = quantize(name, offload=False)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_statistics_are_not_needed_to_change_a_block_on_its_device(monkeypatch):
    model = tiny_model("llama")
    blocks = get_blocks(model)
    make_quantizable_(model, blocks, QuantScheme(2, 16))
    offload_(model, blocks, HOST)
    step, seen = CoarseToFine(weights=True, activations=False), []
    limits = step.weight_limits
    monkeypatch.setattr(
        step,
        "weight_limits",
        lambda linear: seen.append([block.offloaded.on_device for block in blocks]) or limits(linear),
    )
    step.apply_(model, blocks, token_ids())
    assert seen == [[number == index for number in range(4)] for index in range(4) for _ in range(7)]


@pytest.mark.parametrize(
    ("offload", "share_of_free", "expected"),
    [("auto", 0.5, False), ("auto", 0.7, True), (True, 0.1, True), (False, 2.0, False)],
)
def test_auto_goes_by_what_is_free(monkeypatch, offload, share_of_free, expected):
    model = tiny_model("llama")
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) + 8 * 4  # and the frequencies of the rotations
    assert size <= model_bytes(model) <= size + 64
    done = []
    monkeypatch.setattr("cbq.placement.free_device_bytes", lambda device: model_bytes(model) / share_of_free)
    monkeypatch.setattr("cbq.placement.offload_", lambda *args: done.append("offload"))
    monkeypatch.setattr(model, "to", lambda device: done.append("whole"))
    assert place_(model, GPU, offload) is expected
    assert done == ["offload" if expected else "whole"]


@pytest.mark.parametrize(("bits", "expected"), [(4, True), (16, False)])
def test_auto_counts_the_integers_that_there_will_be(monkeypatch, bits, expected):
    """Full precision takes 0.55 of what is free, and fits; finished blocks take a byte a weight more."""
    model = tiny_model("llama")
    make_quantizable_(model, get_blocks(model), QuantScheme(bits, 8))
    free = model_bytes(model) / 0.55
    monkeypatch.setattr("cbq.placement.free_device_bytes", lambda device: free)
    monkeypatch.setattr("cbq.placement.offload_", lambda *args: None)
    monkeypatch.setattr(model, "to", lambda device: None)
    assert place_(model, GPU) is expected
    fuse_linears_(get_blocks(model))
    assert (model_bytes(model) > RESIDENT_SHARE * free) is expected, "as it came out"
    assert place_(model, GPU) is expected, "integers that are there count once"


@pytest.mark.parametrize(
    ("device", "share_of_free", "refused"), [(GPU, 0.5, False), (GPU, 0.7, True), (HOST, 2, False)]
)
def test_work_on_the_whole_model_needs_room_for_it(monkeypatch, device, share_of_free, refused):
    model = tiny_model("llama")
    monkeypatch.setattr("cbq.placement.free_device_bytes", lambda device: model_bytes(model) / share_of_free)
    with pytest.raises(InputError, match=r"takes 0\.00\d+ GiB, .* at most 0\.6 of") if refused else nullcontext():
        check_fits(model, device)


@pytest.mark.parametrize("offload", ["auto", True, False])
def test_on_the_host_nothing_is_done(offload):
    model = tiny_model("llama")
    assert place_(model, HOST, offload) is False
    assert not any(hasattr(block, "offloaded") for block in get_blocks(model))
    with lent(get_blocks(model)), moved(get_blocks(model)):
        pass


@pytest.mark.parametrize("offload", ["yes", None, 1, "true"])
def test_unknown_choices_are_refused(offload):
    with pytest.raises(InputError, match="offload must be auto, true or false"):
        check_offload(offload)
