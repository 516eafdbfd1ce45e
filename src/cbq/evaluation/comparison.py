"""Two models that should compute the same, on the same text.

Shapes: N segments, T tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import LongTensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Comparison:
    """How far another model's logits are from a model's.

    Args:
        max_difference: the largest difference of two logits.
        mean_difference: the mean of their absolute values.
        perplexity: of the model.
        other_perplexity: of the other one.
    """

    max_difference: float
    mean_difference: float
    perplexity: float
    other_perplexity: float


@torch.no_grad()
def compare_logits(model: nn.Module, other: nn.Module, segments: LongTensor) -> Comparison:
    """Compare the logits of two causal language models, a segment at a time.

    Args:
        model: in evaluation mode.
        other: likewise; it may be on another device.
        segments: token ids, (N, T), T at least 2.
    """
    largest, total, count = 0.0, 0.0, 0
    nll = [0.0, 0.0]
    for segment in segments:
        logits = [
            each(input_ids=segment[None].to(next(each.parameters()).device), use_cache=False).logits[0].float().cpu()
            for each in (model, other)
        ]
        difference = (logits[0] - logits[1]).abs()
        largest = max(largest, difference.max().item()) if not difference.isnan().any() else math.inf
        total += difference.double().sum().item()
        count += difference.numel()
        for number, each in enumerate(logits):
            nll[number] += F.cross_entropy(each[:-1].double(), segment[1:].cpu(), reduction="sum").item()
    predicted = segments.shape[0] * (segments.shape[1] - 1)
    return Comparison(largest, total / count, *(exp(each / predicted) for each in nll))


def exp(x: float) -> float:
    """Return e^x, infinite where it is too large."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
