"""How far a quantized window's output is from its target (paper Eq. 7, Table 5).

Shapes: B batch, T tokens, D hidden.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from cbq.errors import InputError


def l2(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean distance of each token's hidden states, averaged over tokens.

    Args:
        target: (B, T, D).
        output: (B, T, D).

    Example:
        >>> l2(torch.zeros(1, 2, 2), torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]))
        tensor(2.5000)

    Source: Eq. 7, first term.
    """
    return torch.linalg.vector_norm(output.float() - target.float(), dim=-1).mean()


def mse(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error over all elements.

    Example:
        >>> mse(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 3.0]]]))
        tensor(5.)
    """
    return F.mse_loss(output.float(), target.float())


def kld(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(target) || softmax(output)) over the D features, averaged over tokens, in nats.

    Args:
        target: (B, T, D), full precision.
        output: (B, T, D), quantized.

    Example:
        >>> kld(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)).item()
        0.0

    Source: Eq. 7, second term, at temperature 1.
    """
    expected = F.log_softmax(target.float(), dim=-1)
    actual = F.log_softmax(output.float(), dim=-1)
    return F.kl_div(actual, expected, reduction="none", log_target=True).sum(-1).mean()


TERMS = {"l2": l2, "kld": kld, "mse": mse}


class ReconstructionLoss(nn.Module):
    """The weighted sum of the terms above; a term of weight 0 is not computed.

    Args:
        l2: weight of the L2 distance.
        kld: weight of the KL divergence.
        mse: weight of the mean squared error.

    Raises:
        InputError: a weight is negative, or all are 0.

    Source: Eq. 7: l2 = kld = 1.
    """

    def __init__(self, l2: float = 1.0, kld: float = 1.0, mse: float = 0.0) -> None:
        super().__init__()
        weights = {"l2": l2, "kld": kld, "mse": mse}
        for name, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
                raise InputError(f"loss.{name} must be a number of at least 0, got {weight!r}")
        if not any(weights.values()):
            raise InputError("one of loss.l2, loss.kld and loss.mse must be above 0")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}

    def forward(self, target: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss, and each unweighted term by name."""
        terms = {name: TERMS[name](target, output) for name in self.weights}
        return sum(self.weights[name] * term for name, term in terms.items()), terms
