"""Agreement with full precision, against plain forwards of both models side by side."""

import copy
import math

import pytest
import torch
from tiny_models import TINY, tiny_model, token_ids

from cbq.errors import InputError
from cbq.evaluation.agreement import compare, remember, sample, signal_to_noise_db
from cbq.models.families import get_blocks


def disturbed(model):
    """Return a copy whose blocks are off by some noise."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in get_blocks(other).parameters():
        if parameter.dim() > 1:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator) * parameter.std())
    return other


@pytest.mark.parametrize("name", TINY)
def test_side_by_side(name):
    model, segments = tiny_model(name), token_ids(3, 12)
    model.get_output_embeddings().weight.mul_(10)  # a random model prefers no token
    other = disturbed(model)
    found = compare(other, get_blocks(other), remember(model, get_blocks(model), segments))
    kl, same, count = 0.0, 0, 0
    with torch.no_grad():
        for segment in segments:
            p = model(segment[None], use_cache=False).logits[0].double().softmax(-1)
            q = other(segment[None], use_cache=False).logits[0].double().softmax(-1)
            for position in range(len(segment)):
                kl += sum(a * math.log(a / b) for a, b in zip(p[position].tolist(), q[position].tolist(), strict=True))
                same += p[position].argmax() == q[position].argmax()
                count += 1
    assert found.kl_divergence == pytest.approx(kl / count, rel=1e-3)
    assert found.top1 == pytest.approx(int(same) / count)
    assert found.num_tokens == count == 36
    assert found.kl_divergence > 1e-4


@pytest.mark.parametrize("name", ["llama", "bloom"])  # outputs as a tensor, and as a tuple
def test_signal_to_noise_by_block(name):
    model, segments = tiny_model(name), token_ids(2, 10)
    other = disturbed(model)
    found = compare(other, get_blocks(other), remember(model, get_blocks(model), segments))
    with torch.no_grad():
        before, after = ([] for _ in range(2))
        for states, source in ((before, model), (after, other)):
            hooks = [
                block.register_forward_hook(
                    lambda _, args, output, states=states: states.append(
                        output[0] if isinstance(output, tuple) else output
                    )
                )
                for block in get_blocks(source)
            ]
            source(segments, use_cache=False)
            for hook in hooks:
                hook.remove()
    expected = []
    for b, a in zip(before, after, strict=True):
        tokens = zip(b.flatten(0, 1), a.flatten(0, 1), strict=True)
        expected.append(torch.stack([20 * (h.norm() / (h - h_q).norm()).log10() for h, h_q in tokens]).mean().item())
    assert found.block_snr_db == pytest.approx(expected, rel=1e-4)
    assert found.block_snr_db[0] > found.block_snr_db[-1]  # noise adds up


def test_a_model_agrees_with_itself():
    model = tiny_model("llama")
    found = compare(model, get_blocks(model), remember(model, get_blocks(model), token_ids(2, 8)))
    assert found.kl_divergence == 0
    assert found.top1 == 1
    assert all(130 < value < 140 for value in found.block_snr_db)  # what float32 can tell apart


def test_one_giant_token_does_not_hide_the_others():
    signal = torch.ones(100, 4)
    signal[0] *= 1000
    noisy = signal.clone()
    noisy[1:] += 1  # as much noise as signal: 0 dB, everywhere but where the first is
    assert signal_to_noise_db(signal, noisy) < 2


def test_sampled_positions_are_all_of_a_short_text_and_spread_over_a_long_one():
    short = sample(torch.zeros(3, 5))
    assert short.tolist() == [[n, t] for n in range(3) for t in range(5)]
    long = sample(torch.zeros(8, 512))
    assert long.shape == (1024, 2)
    assert len(long.unique(dim=0)) == 1024
    assert set(long[:, 0].tolist()) == set(range(8))
    assert torch.equal(long, sample(torch.zeros(8, 512)))


def test_another_model_is_refused():
    model, other = tiny_model("llama"), tiny_model("llama")
    reference = remember(model, get_blocks(model), token_ids(1, 8))
    other.lm_head.weight[0, 0] += 1
    with pytest.raises(InputError, match="the checkpoint is not of this model"):
        compare(other, get_blocks(other), reference)
    with pytest.raises(InputError, match="numbers of blocks differ"):
        compare(model, get_blocks(model)[:3], reference)
