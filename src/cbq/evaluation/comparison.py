"""Two models that should compute the same, on the same text.

Shapes: N segments, T tokens, M = N * (T - 1) predicted tokens.
"""

import math
from dataclasses import dataclass, replace

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
        full_precision_perplexity: of the model that the first one was quantized from; None, here and below: not known.
        distance: root mean square difference of a token's log likelihood, of the model from full precision, in nats.
        other_distance: likewise, of the other one from full precision.
    """

    max_difference: float
    mean_difference: float
    perplexity: float
    other_perplexity: float
    full_precision_perplexity: float | None = None
    distance: float | None = None
    other_distance: float | None = None


@torch.no_grad()
def compare_logits(
    model: nn.Module, other: nn.Module, segments: LongTensor, full_precision: torch.Tensor | None = None
) -> Comparison:
    """Compare the logits of two causal language models, a segment at a time.

    Args:
        model: in evaluation mode.
        other: likewise; it may be on another device.
        segments: token ids, (N, T), T at least 2.
        full_precision: the `token_nll` of the model that `model` was quantized from, (M,); None: not known.
    """
    largest, total, count = 0.0, 0.0, 0
    nll: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for segment in segments:
        logits = [logits_after(each, segment) for each in (model, other)]
        difference = (logits[0] - logits[1]).abs()
        largest = max(largest, difference.max().item()) if not difference.isnan().any() else math.inf
        total += difference.double().sum().item()
        count += difference.numel()
        for found, each in zip(nll, logits, strict=True):
            found.append(next_token_nll(each, segment))
    one, another = map(torch.cat, nll)
    found = Comparison(largest, total / count, perplexity(one), perplexity(another))
    if full_precision is None:
        return found
    return replace(
        found,
        full_precision_perplexity=perplexity(full_precision),
        distance=rms_difference(one, full_precision),
        other_distance=rms_difference(another, full_precision),
    )


@torch.no_grad()
def token_nll(model: nn.Module, segments: LongTensor) -> torch.Tensor:
    """Return the negative log likelihood of every predicted token, in nats, (M,), float64, in host memory.

    Args:
        model: a causal language model in evaluation mode.
        segments: token ids, (N, T), T at least 2.
    """
    return torch.cat([next_token_nll(logits_after(model, segment), segment) for segment in segments])


def logits_after(model: nn.Module, segment: LongTensor) -> torch.Tensor:
    """Return a model's logits after each token of a segment (T,), in float32, in host memory."""
    ids = segment[None].to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False).logits[0].float().cpu()


def next_token_nll(logits: torch.Tensor, segment: LongTensor) -> torch.Tensor:
    """Return the negative log likelihood of the tokens of a segment (T,) but the first, (T - 1,), float64."""
    return F.cross_entropy(logits[:-1].double(), segment[1:].cpu(), reduction="none")


def perplexity(nll: torch.Tensor) -> float:
    """Return the perplexity of tokens, of their negative log likelihoods (M,).

    Example:
        >>> round(perplexity(torch.tensor([4.0, 1.0], dtype=torch.float64).log()), 6)
        2.0
    """
    return exp(nll.mean().item())


def rms_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the root mean square difference of two tensors of one shape.

    Example:
        >>> rms_difference(torch.tensor([1.0, 5.0]), torch.tensor([0.0, -2.0]))
        5.0
    """
    return (one - other).square().mean().sqrt().item()


def exp(x: float) -> float:
    """Return e^x, infinite where it is too large."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
