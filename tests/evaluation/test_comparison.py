"""Two models on the same text."""

import math

import pytest
import torch
from torch.nn import functional as F

from cbq.evaluation.comparison import compare_logits, token_nll
from cbq.models.loading import load_pretrained


def test_differences_and_perplexities(tiny_llama_folder):
    model = load_pretrained(str(tiny_llama_folder)).model
    other = load_pretrained(str(tiny_llama_folder)).model
    segments = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))
    assert compare_logits(model, other, segments).max_difference == 0
    other.lm_head.weight.mul_(1.1)
    found = compare_logits(model, other, segments)
    with torch.no_grad():
        both = [each(input_ids=segments).logits for each in (model, other)]
    difference = (both[0] - both[1]).abs()
    assert found.max_difference == pytest.approx(difference.max().item(), rel=1e-5)
    assert found.mean_difference == pytest.approx(difference.mean().item(), rel=1e-5)
    for logits, perplexity in zip(both, (found.perplexity, found.other_perplexity), strict=True):
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), segments[:, 1:].flatten())
        assert perplexity == pytest.approx(math.exp(nll), rel=1e-5)


def test_a_model_that_is_broken_differs_infinitely(tiny_llama_folder):
    model = load_pretrained(str(tiny_llama_folder)).model
    other = load_pretrained(str(tiny_llama_folder)).model
    other.lm_head.weight.fill_(float("nan"))
    found = compare_logits(model, other, torch.ones(1, 4, dtype=torch.long))
    assert found.max_difference == math.inf


def test_distances_from_full_precision(tiny_llama_folder):
    model, other, base = (load_pretrained(str(tiny_llama_folder)).model for _ in range(3))
    model.lm_head.weight.mul_(1.1)
    other.lm_head.weight.mul_(0.8)
    segments = torch.randint(320, (3, 16), generator=torch.Generator().manual_seed(0))
    found = compare_logits(model, other, segments, token_nll(base, segments))
    likelihoods = []
    for each in (base, model, other):
        with torch.no_grad():
            probabilities = each(input_ids=segments).logits[:, :-1].double().softmax(-1)
        likelihoods.append(probabilities.gather(-1, segments[:, 1:, None]).log())
    assert found.full_precision_perplexity == pytest.approx(math.exp(-likelihoods[0].mean()), rel=1e-5)
    for distance, each in zip((found.distance, found.other_distance), likelihoods[1:], strict=True):
        assert distance == pytest.approx((each - likelihoods[0]).pow(2).mean().item() ** 0.5, rel=1e-4)
    assert compare_logits(model, other, segments).distance is None
