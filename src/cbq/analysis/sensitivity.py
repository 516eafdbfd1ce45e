"""How much a model suffers when one block, or one linear, is quantized alone.

Shapes: N segments, T tokens, D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from cbq.analysis.schemes import named_linears, set_scheme_
from cbq.evaluation.agreement import kl_divergence
from cbq.evaluation.evaluation import show_nothing
from cbq.models.head import last_hidden_states, logits_of
from cbq.models.loading import LoadedModel, PreTrainedModel
from cbq.preprocess.statistics import set_act_ranges_
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one thing does.

    Args:
        loss_change: of the mean negative log likelihood, in nats a token; it may be below 0.
        perplexity: afterwards.
        kl_divergence: of the next-token distribution from that of full precision, in nats a token; never below 0.
    """

    loss_change: float
    perplexity: float
    kl_divergence: float


class FullPrecision:
    """What the full-precision model computes of some segments, to compare others with.

    Args:
        model: in the full-precision state, in eval mode.
        segments: token ids on its device, (N, T).

    Attributes:
        hidden: what the head reads, N tensors (1, T, D) in host memory.
        loss: mean negative log likelihood, in nats a token.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, segments: torch.Tensor) -> None:
        self.segments = segments
        self.hidden = [last_hidden_states(model, segment).cpu() for segment in segments.split(1)]
        self.loss = 0.0
        self.loss = self.compare(model).loss_change

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> Sensitivity:
        """Return what became of the model in the state that it is in."""
        nll = divergence = 0.0
        for segment, hidden in zip(self.segments.split(1), self.hidden, strict=True):
            found = model(input_ids=segment, use_cache=False).logits[0].float()  # (T, V)
            expected = logits_of(model, hidden.to(segment.device))[0].float()
            nll += float(F.cross_entropy(found[:-1], segment[0, 1:], reduction="none").double().mean())
            divergence += float(kl_divergence(expected, found).double().mean())
        loss = nll / len(self.hidden)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Sensitivity(loss - self.loss, perplexity, divergence / len(self.hidden))


def scan(
    loaded: LoadedModel,
    scheme: QuantScheme,
    bits: Sequence[int],
    segments: torch.Tensor,
    track: Callable[[Sequence, str], Iterable] = show_nothing,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Quantize every block alone, and every linear alone, to nearest; all else stays in full precision.

    Args:
        loaded: after `make_quantizable_`, on the device to work on; its linears end with the last of the bits.
        scheme: all but the bits of the weights; activations too, where it quantizes them.
        bits: of the weights.
        segments: token ids on the device, (N, T).
        track: shows how far a sequence is.

    Returns:
        `blocks` and `linears`: by name and bits, a `Sensitivity`.
    """
    reference = FullPrecision(loaded.model, segments)

    def alone(module: nn.Module) -> dict[str, float]:
        with quant_state(module, QuantState.NEAREST):
            return asdict(reference.compare(loaded.model))

    found: dict[str, dict] = {"blocks": {}, "linears": {}}
    for width in bits:
        set_scheme_(loaded.blocks, replace(scheme, weight_bits=width))
        set_act_ranges_(loaded.model, loaded.blocks, segments)
        for index, block in enumerate(track(list(loaded.blocks), f"blocks alone at {width} bits")):
            found["blocks"].setdefault(f"blocks.{index}", {})[str(width)] = alone(block)
        linears = list(named_linears(loaded.blocks).items())
        for name, linear in track(linears, f"linears alone at {width} bits"):
            found["linears"].setdefault(name, {})[str(width)] = alone(linear)
    return found
