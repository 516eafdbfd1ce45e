"""The loss over the scales of two blocks (Figure 1 (c)): the true one, every weight rounded anew at every point.

Shapes: N segments, T tokens, P points an axis.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from cbq.analysis.curvature import frozen_rounding
from cbq.evaluation.evaluation import show_nothing
from cbq.evaluation.perplexity import mean_token_nll
from cbq.models.loading import PreTrainedModel
from cbq.quant.linear import quant_linears
from cbq.quant.state import QuantState, quant_state

BATCH_TOKENS = 2048  # of 512 to 8,192 the fastest on a CPU


@torch.no_grad()
def multiply_scales_(block: nn.Module, multiplier: float) -> None:
    """Make every weight step size of a block `multiplier` times that of the weights' range; zero points stay."""
    for linear in quant_linears(block):
        if linear.weight_quantizer:
            linear.weight_quantizer.step_size.multiplier.fill_(multiplier)


@torch.no_grad()
def loss_surface(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    first: int,
    multipliers: Sequence[float],
    segments: torch.Tensor,
    track: Callable[[Sequence, str], Iterable] = show_nothing,
) -> torch.Tensor:
    """Return the loss with the step sizes of two neighbouring blocks multiplied, all blocks rounded to nearest.

    Args:
        model: its block linears in the full-precision state, with quantizers that nothing has been learned for.
        blocks: all of its blocks.
        first: the index of the first one of the two.
        multipliers: P of them, tried for each block.
        segments: token ids on the model's device, (N, T).
        track: shows how far a sequence is.

    Returns:
        (P, P), nats a token, float64: rows are the first block's multipliers, columns the second's.

    Source: Figure 1 (c).
    """
    pair = list(blocks[first : first + 2])
    others = [block for index, block in enumerate(blocks) if index not in (first, first + 1)]
    surface = torch.zeros(len(multipliers), len(multipliers), dtype=torch.float64)
    batches = segments.split(max(1, BATCH_TOKENS // segments.shape[1]))
    # The learned state of what nothing is learned for: round to nearest, on the grid of the multiplied scale.
    with frozen_rounding(others), quant_state(pair, QuantState.LEARNED):
        try:
            for row, mine in enumerate(track(list(multipliers), "loss surface")):
                multiply_scales_(pair[0], mine)
                for column, other in enumerate(multipliers):
                    multiply_scales_(pair[1], other)
                    surface[row, column] = mean_token_nll(model, batches)
        finally:
            for block in pair:
                multiply_scales_(block, 1.0)
    return surface
