"""The rectified sigmoid that AdaRound and LoRA-Rounding learn through, and what drives it to 0 or 1."""

import torch

from cbq.quant.formulas import GAMMA, ZETA


def rectified_sigmoid(rounding_logits: torch.Tensor) -> torch.Tensor:
    """Return Clip(Sigmoid(V)(zeta - gamma) + gamma, 0, 1).

    Example:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])

    Source: Eq. 8.
    """
    return (torch.sigmoid(rounding_logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def shifted_rectified_sigmoid(fraction: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return Eq. 8 at V0 + shift, where V0 is the frozen point at which Eq. 8 gives `fraction`.

    sigmoid(logit(p) + shift) = p / (p + (1 - p) exp(-shift)): V0 itself is never computed or stored.

    Args:
        fraction: values in [0, 1), what rounding down would lose.
        shift: learned, same shape, 0 at the start.

    Example:
        >>> shifted_rectified_sigmoid(torch.tensor([0.25]), torch.tensor([0.0]))
        tensor([0.2500])

    Note: the paper starts at V = A1 A2 = 0, which by Eq. 8 is 0.5 everywhere: neither full precision nor
        round-to-nearest. Starting at V0 is AdaRound's way (METHOD 1).
    """
    p = (fraction - GAMMA) / (ZETA - GAMMA)
    return (p / (p + (1 - p) * torch.exp((-shift).clamp_max(80))) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def compensation_loss(rounding_values: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """Return the mean over elements of 1 - |2 Delta_W - 1|^beta: 0 when every value is 0 or 1, at most 1.

    Example:
        >>> compensation_loss(torch.tensor([0.0, 0.5, 1.0, 0.5]), beta=2.0)
        tensor(0.5000)

    Source: Eq. 12.
    Note: a mean instead of the printed sum, so that its weight in Eq. 13 does not depend on the model's width.
    """
    return (1 - (2 * rounding_values - 1).abs().pow(beta)).mean()
