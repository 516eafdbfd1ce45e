"""The two streams against the plain Hugging Face forward."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from cbq.activations import ActivationCache, BlockCall, capture_block_calls, capture_first_inputs, stream_bytes
from cbq.streams.kinds import Stream
from cbq.streams.places import ON_DEVICE, OnDisk, OnHost, Place

NUM_BLOCKS = 4


@pytest.fixture(scope="module")
def model(tiny_llama_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def segments() -> torch.Tensor:
    return torch.randint(320, (5, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain_states(model: PreTrainedModel, segments: torch.Tensor) -> list[torch.Tensor]:
    """The stream after 0, 1, ... 3 blocks by `output_hidden_states`; after the last block, its final norm is in it."""
    return list(model(segments, output_hidden_states=True).hidden_states)


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.fixture(params=["device", "host", "disk"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return {"device": ON_DEVICE, "host": OnHost(), "disk": OnDisk(tmp_path)}[request.param]


@pytest.mark.parametrize("stops", [[1, 2, 3, 4], [2, 4], [4], [0, 3, 3, 4]])
def test_stream_equals_the_plain_hidden_states(model, segments, plain_states, stops, place):
    cache = ActivationCache(model, model.model.layers, segments, batch_size=2, place=place)
    torch.testing.assert_close(cache.full_precision[:], plain_states[0], rtol=0, atol=0)
    for stop in stops:
        for stream in (cache.advance_full_precision(stop), cache.advance_quantized(stop)):
            state = model.model.norm(stream[:]) if stop == NUM_BLOCKS else stream[:]
            torch.testing.assert_close(state, plain_states[stop], rtol=1e-5, atol=1e-5)
        assert cache.full_precision_at == cache.quantized_at == stop
        assert stream is cache.quantized
    assert not stream[:].requires_grad


@pytest.mark.parametrize("first", ["advance_full_precision", "advance_quantized"])
def test_two_streams_are_made_and_then_overwritten(model, segments, place, first):
    """Moving on takes no further room."""
    made = []
    place.make = lambda *args, make=place.make: made.append(make(*args)) or made[-1]
    try:
        cache = ActivationCache(model, model.model.layers, segments, place=place)
        for stop in (1, 2, 4):
            getattr(cache, first)(stop)
            cache.advance_full_precision(stop)
            cache.advance_quantized(stop)
    finally:
        del place.make
    assert len(made) == 2
    assert {id(stream) for stream in made} == {id(cache.full_precision), id(cache.quantized)}


@pytest.mark.gpu
def test_places_agree_on_a_gpu(model, segments, tmp_path):
    """To the bit, as on a CPU, with blocks that the copies overlap with."""
    model = copy.deepcopy(model).cuda()
    found = []
    for place in (ON_DEVICE, OnHost(), OnDisk(tmp_path)):
        cache = ActivationCache(model, model.model.layers, segments.repeat(20, 1), batch_size=8, place=place)
        cache.advance_full_precision(2)
        cache.advance_quantized(1)
        states = [cache.full_precision[:].clone(), cache.quantized[:].clone()]
        found.append([*states, cache.advance_full_precision(4)[:]])
    for others in found[1:]:
        assert all(torch.equal(a, b) and a.is_cuda for a, b in zip(found[0], others, strict=True))


def test_stream_bytes(model, segments, place):
    stream = ActivationCache(model, model.model.layers, segments, place=place).full_precision
    assert stream_bytes(model, model.model.layers, segments) == stream[:].nbytes == 5 * 24 * 64 * 4


def test_every_block_changes_the_stream(plain_states):
    """Otherwise the test above would prove nothing."""
    for before, after in itertools.pairwise(plain_states):
        assert (before - after).abs().max() > 0.1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_batch_size_does_not_matter(model, segments, plain_states, batch_size):
    cache = ActivationCache(model, model.model.layers, segments, batch_size)
    assert len(cache) == 5
    torch.testing.assert_close(cache.full_precision[:], plain_states[0], rtol=0, atol=0)
    torch.testing.assert_close(cache.advance_full_precision(3)[:], plain_states[3], rtol=1e-5, atol=1e-5)


def test_streams_are_independent(model, segments, plain_states):
    """A block that changes between the streams shows in the second only, and a stream is never recomputed."""
    model = copy.deepcopy(model)
    cache = ActivationCache(model, model.model.layers, segments)
    cache.advance_full_precision(2)
    model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
    cache.advance_quantized(2)
    torch.testing.assert_close(cache.full_precision[:], plain_states[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cache.quantized[:], plain_states[2], atol=1e-2)


@pytest.mark.parametrize("advance", ["advance_full_precision", "advance_quantized"])
def test_streams_do_not_go_back(model, segments, advance):
    cache = ActivationCache(model, model.model.layers, segments)
    getattr(cache, advance)(2)
    with pytest.raises(AssertionError, match="only moves forward"):
        getattr(cache, advance)(1)


def test_run_blocks_has_gradients_and_map_stream_has_none(model, segments, plain_states):
    cache = ActivationCache(model, model.model.layers, segments)
    hidden = plain_states[1].clone().requires_grad_()
    output = cache.run_blocks(1, 3, hidden)
    torch.testing.assert_close(output, plain_states[3], rtol=1e-5, atol=1e-5)
    output.sum().backward()
    assert (hidden.grad != 0).any()
    stream = Stream(hidden, hidden.device)
    assert not cache.map_stream(1, 3, stream)[:].requires_grad
    torch.testing.assert_close(hidden, plain_states[1], rtol=0, atol=0)  # read, not overwritten


def test_capture_leaves_no_hook(model, segments):
    before = count_hooks(model)
    blocks = model.model.layers
    calls = capture_block_calls(model, blocks, segments[:1])
    assert len(list(capture_first_inputs(model, blocks[0], segments, 2))) == 3
    assert len(calls) == NUM_BLOCKS
    assert all("hidden_states" not in call.kwargs and call.args == () for call in calls)
    assert count_hooks(model) == before
    with pytest.raises(IndexError):  # a token id beyond the vocabulary
        next(capture_first_inputs(model, blocks[0], segments + 10_000, 2))
    with pytest.raises(IndexError):
        capture_block_calls(model, blocks, segments[:1] + 10_000)
    assert count_hooks(model) == before


class ToyBlock(nn.Module):
    """Adds what it is called with; hands back a tuple where asked, as older transformers do."""

    def __init__(self, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states: torch.Tensor, offset: int, factor: int = 1) -> torch.Tensor | tuple:
        output = hidden_states * factor + offset
        return (output, "attention weights") if self.as_tuple else output


class ToyModel(nn.Module):
    """Passes hidden states by position or by name, and different arguments to each block."""

    config = LlamaConfig()

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name
        self.embedding = nn.Embedding(10, 3)
        self.blocks = nn.ModuleList([ToyBlock(True), ToyBlock(False), ToyBlock(True)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for offset, block in enumerate(self.blocks):
            if self.by_name:
                output = block(hidden_states=hidden, offset=offset, factor=2)
            else:
                output = block(hidden, offset, factor=2)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


@pytest.mark.parametrize("by_name", [False, True])
def test_tuples_and_each_blocks_own_arguments(by_name):
    model, segments = ToyModel(by_name), torch.arange(8).view(4, 2)
    cache = ActivationCache(model, model.blocks, segments, batch_size=3)
    own = [BlockCall((), {"offset": i, "factor": 2}) if by_name else BlockCall((i,), {"factor": 2}) for i in range(3)]
    assert cache.calls_of(1) == own
    torch.testing.assert_close(cache.advance_full_precision(3)[:], model(segments, use_cache=False))
