"""Where a window's roundings start, if not at round-to-nearest: where another solver put them.

Shapes: O out_features, I in_features.
"""

import torch
from torch import nn

from cbq.activations import ActivationCache
from cbq.quant.affine import to_groups
from cbq.quant.linear import QuantLinear, quant_linears
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.windows import Window

EDGE = 0.49  # of a step: what lies this far beyond the grid's last integer still rounds to it


def start_from_(solver: GPTQ, window: Window, cache: ActivationCache, new: set[nn.Module]) -> None:
    """Let the roundings of what is new to reconstruction start where `solver` puts them.

    Args:
        solver: rounds a block's linears.
        window: which blocks; all their linears are in the learned state.
        cache: its quantized stream must be at window.start.
        new: the linears to start; those of other blocks keep what they learned.

    Raises:
        InputError: a rounding cannot start from given values.
    """
    for index in range(window.rounding_start, window.stop):
        linears = [linear for linear in quant_linears(cache.blocks[index]) if linear in new]
        linears = [linear for linear in linears if linear.weight_quantizer is not None]
        if not linears:
            continue
        learned = [linear.rounding for linear in linears]
        solver.solve_block_(cache, window.start, index)
        for linear, rounding in zip(linears, learned, strict=True):
            rounding.start_from_(offset_of(linear))
            linear.rounding = rounding


@torch.no_grad()
def offset_of(linear: QuantLinear) -> torch.Tensor:
    """Return what a linear's given integers were rounded from, less W / s, (O, I), in units of the scale.

    What lies beyond the grid is brought to its edge, where a gradient still moves it.
    """
    quantizer, given = linear.weight_quantizer, linear.rounding
    scale, zero_point = quantizer.grid()
    edges = quantizer.quant_min - zero_point - EDGE, quantizer.quant_max - zero_point + EDGE
    groups = to_groups(linear.weight.float(), quantizer.group_size)
    return (given.steps.view_as(groups).clamp(*edges) - groups / scale).flatten(1)
