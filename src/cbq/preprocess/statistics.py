"""What preprocessing must know of the calibration data: one pass of the full-precision stream, block by block.

Shapes: N segments, T tokens, I in_features.
"""

from collections.abc import Iterator

import torch
from torch import nn

from cbq.activations import ActivationCache


def input_maxima(model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """Yield, for each block in order, the largest |x| of each input feature of its linears, (I,), by their names.

    The stream has passed a block when its statistics come: the block may then be changed.

    Args:
        model: the language model, its linears in the full-precision state.
        blocks: its blocks.
        segments: calibration token ids, (N, T).
    """
    cache = ActivationCache(model, blocks, segments)
    for index, block in enumerate(blocks):
        maxima: dict[str, torch.Tensor] = {}

        def update(name: str, x: torch.Tensor, maxima: dict[str, torch.Tensor] = maxima) -> None:
            largest = x.detach().float().abs().flatten(0, -2).amax(0)
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

        hooks = [
            module.register_forward_pre_hook(lambda module, args, name=name: update(name, args[0]))
            for name, module in block.named_modules()
            if getattr(module, "in_features", None)
        ]
        try:
            cache.advance_full_precision(index + 1)
        finally:
            for hook in hooks:
                hook.remove()
        yield maxima
