"""How far a quantized model's predictions and hidden states are from the full-precision model's, on held-out text.

Two models of the same accuracy may answer differently item by item; these figures see it.

Shapes: N segments, T tokens, D hidden, V vocabulary, L blocks, K sampled positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from cbq.errors import InputError
from cbq.hashes import hash_tensors
from cbq.models.head import last_hidden_states, logits_of
from cbq.models.loading import PreTrainedModel

NUM_POSITIONS = 1024  # where the blocks' outputs are compared: each holds L * D numbers


@dataclass
class Reference:
    """What the full-precision model computes, kept until the quantized one is there.

    Args:
        segments: token ids, (N, T).
        hidden: the last hidden states, (N, T, D), in the model's dtype, in host memory.
        outputs: every block's output at the sampled positions, L tensors (K, D), in float32, in host memory.
        head: the hash of the output embedding, which must be the other model's too.
    """

    segments: torch.Tensor
    hidden: torch.Tensor
    outputs: list[torch.Tensor]
    head: str


@dataclass(frozen=True)
class Agreement:
    """What is left of the full-precision model.

    Args:
        kl_divergence: of the quantized model's next-token distribution from the full-precision one, in nats a token.
        top1: share of the tokens after which both find the same token most likely.
        block_snr_db: by block, the mean over tokens of |h|^2 / |h - h_q|^2 of its output, in decibels.
        num_tokens: N * T.
    """

    kl_divergence: float
    top1: float
    block_snr_db: list[float]
    num_tokens: int


@torch.no_grad()
def remember(model: PreTrainedModel, blocks: nn.ModuleList, segments: torch.Tensor) -> Reference:
    """Keep what the full-precision model computes.

    Args:
        model: in full precision, in eval mode.
        blocks: its blocks.
        segments: token ids, (N, T).
    """
    with recorded(blocks, sample(segments)) as outputs:
        hidden = torch.cat([run(model, segment).cpu() for segment in segments.split(1)])
    return Reference(segments, hidden, outputs, hash_head(model))


@torch.no_grad()
def compare(model: PreTrainedModel, blocks: nn.ModuleList, reference: Reference) -> Agreement:
    """Compare the quantized model with what was kept.

    Args:
        model: the same model, quantized; its head is as it was.
        blocks: its blocks.
        reference: what `remember` returned.

    Raises:
        InputError: the models do not have the same blocks and the same head.
    """
    if hash_head(model) != reference.head or len(blocks) != len(reference.outputs):
        raise InputError(
            "the checkpoint is not of this model, their output embeddings or numbers of blocks differ: "
            "evaluation.agreement_tokens=0 measures the rest"
        )
    device = next(model.parameters()).device
    divergence, same = 0.0, 0
    with recorded(blocks, sample(reference.segments)) as outputs:
        for segment, before in zip(reference.segments.split(1), reference.hidden.split(1), strict=True):
            found = logits_of(model, run(model, segment)).float()[0]  # (T, V)
            expected = logits_of(model, before.to(device)).float()[0]
            divergence += float(kl_divergence(expected, found).double().sum())
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    num_tokens = reference.segments.numel()
    snr = [signal_to_noise_db(before, after) for before, after in zip(reference.outputs, outputs, strict=True)]
    return Agreement(divergence / num_tokens, same / num_tokens, snr, num_tokens)


def hash_head(model: PreTrainedModel) -> str:
    """Return the hash of a model's output embedding, whatever its dtype."""
    return hash_tensors({"weight": model.get_output_embeddings().weight.cpu().float()})


def run(model: PreTrainedModel, segment: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states, (1, T, D), of one segment of token ids, (1, T)."""
    return last_hidden_states(model, segment.to(next(model.parameters()).device))


def kl_divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return how far one distribution is from another, in nats.

    Args:
        expected: logits, (T, V).
        found: logits, (T, V).

    Returns:
        sum over V of p * log(p / q), (T,).

    Example:
        >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item()
        0.0
    """
    return F.kl_div(found.log_softmax(-1), expected.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def signal_to_noise_db(signal: torch.Tensor, changed: torch.Tensor) -> float:
    """Return how much larger hidden states are than what quantization did to them.

    Args:
        signal: (K, D), of the full-precision model.
        changed: (K, D), of the quantized one.

    Returns:
        The mean over K of 10 log10(|h|^2 / |h - h_q|^2), in decibels. A mean of logarithms: one token whose hidden
        state is a thousand times as large as the others' (the first of a text, in many models) counts once.

    Example:
        >>> signal_to_noise_db(torch.tensor([[10.0, 0.0]]), torch.tensor([[9.0, 0.0]]))
        20.0
    """
    energy = signal.double().square().sum(-1)
    noise = (signal.double() - changed.double()).square().sum(-1)
    floor = torch.finfo(torch.float32).eps ** 2  # equal in float32: no more than that can be said
    return float(10 * (energy.clamp_min(1e-30) / noise.clamp_min(floor * energy).clamp_min(1e-30)).log10().mean())


def sample(segments: torch.Tensor) -> torch.Tensor:
    """Return the sampled positions, in order and always the same, as indices (K, 2) of segment and token."""
    total = segments.numel()
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(total, generator=generator)[:NUM_POSITIONS].sort().values
    return torch.stack([chosen // segments.shape[1], chosen % segments.shape[1]], dim=1)


@contextmanager
def recorded(blocks: nn.ModuleList, positions: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Collect every block's output at some positions while segments pass one by one, in order.

    Args:
        blocks: L of them.
        positions: indices (K, 2) of segment and token.

    Yields:
        A list that holds at the end L tensors (K, D) in float32.
    """
    collected: list[list[torch.Tensor]] = [[] for _ in blocks]
    outputs: list[torch.Tensor] = []

    def keep(index: int, output: torch.Tensor | tuple) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # (1, T, D)
        tokens = positions[positions[:, 0] == len(collected[index]), 1].to(hidden.device)
        collected[index].append(hidden[0, tokens].float().cpu())

    hooks = [
        block.register_forward_hook(lambda module, args, output, index=index: keep(index, output))
        for index, block in enumerate(blocks)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
    outputs += [torch.cat(parts) for parts in collected]
