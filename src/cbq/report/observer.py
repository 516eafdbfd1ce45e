"""What a run's page shows that results and curves do not hold: outliers, weights on their grid, generated texts.

Everything goes into `<run folder>/report/`, a file in one piece each, and nothing of it into the run: no random number
is drawn and nothing is changed.

- `outliers.json`: by scaling pair and by linear, the largest magnitudes of some channels before and after
  preprocessing, and the thresholds of Algorithm 1;
- `weights/block_<number>.json`: by linear, how its weights lie on the integer grid, and how often integers are taken;
- `texts.json`: what the model writes before and after.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from cbq.models.equivalent import producer_maxima
from cbq.models.families import scaling_pairs
from cbq.preprocess.cfp import CoarseToFine
from cbq.preprocess.outliers import coarse_threshold, largest_reserved
from cbq.preprocess.statistics import input_statistics
from cbq.quant.affine import to_groups
from cbq.quant.linear import QuantLinear
from cbq.results import write_json

FOLDER_NAME = "report"
WATCHED_SEGMENTS = 4  # of calibration, for ranges of activations
MAX_POINTS = 20_000  # of channels that are kept, in the whole model
BINS_AN_INTEGER, MAX_BINS = 4, 128
DIGITS = 4  # that a kept number has

Maxima = dict[tuple[int, str], torch.Tensor]


class OutlierWatch:
    """Sees what outliers there are before preprocessing, and after it when they are written down.

    Args:
        model: the language model, its linears in the full-precision state.
        blocks: its blocks.
        segments: calibration token ids, (N, T); some are looked at.
        preprocess: whose options of Algorithm 1 are taken, if it has any; else the paper's.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor, preprocess: object) -> None:
        self.model, self.blocks, self.segments = model, blocks, segments[:WATCHED_SEGMENTS]
        self.options = {}
        if isinstance(preprocess, CoarseToFine):
            self.options = {name: getattr(preprocess, name) for name in ("lambda1", "lambda2", "reserved")}
        self.before = self.look()

    def look(self) -> dict[str, Maxima]:
        """Return the largest magnitudes of activations' channels and weights' rows, as they are now."""
        return {
            "activations": channel_maxima(self.model, self.blocks, self.segments),
            "weights": row_maxima(self.blocks),
        }

    def write(self, folder: Path) -> None:
        """Write `<folder>/report/outliers.json`."""
        after = self.look()
        kept = max(32, MAX_POINTS // max(1, sum(map(len, self.before.values()))))
        content = {
            kind: [describe(key, found, after[kind][key], self.options, kept) for key, found in maxima.items()]
            for kind, maxima in self.before.items()
        }
        write_json(folder / FOLDER_NAME / "outliers.json", content)


def channel_maxima(model: nn.Module, blocks: nn.ModuleList, segments: torch.Tensor) -> Maxima:
    """Return, by block and producer, the largest |x| of each channel that can be scaled, (C,)."""
    return {
        (index, pair.producer): producer_maxima(pair, block, found[pair.consumers[0]].maxima).cpu()
        for index, (block, found) in enumerate(zip(blocks, input_statistics(model, blocks, segments), strict=True))
        for pair in scaling_pairs(model.config, block)
    }


def row_maxima(blocks: nn.ModuleList) -> Maxima:
    """Return, by block and linear, the largest |w| of each output channel that its grid covers, (O,)."""
    return {
        (index, name): torch.maximum(-linear.weight_quantizer.low, linear.weight_quantizer.high).amax((1, 2)).cpu()
        for index, block in enumerate(blocks)
        for name, linear in quantized_weights(block)
    }


def quantized_weights(block: nn.Module) -> list[tuple[str, QuantLinear]]:
    """Return a block's linears whose weights are quantized, by name."""
    named = ((name, module) for name, module in block.named_modules() if isinstance(module, QuantLinear))
    return [(name, linear) for name, linear in named if linear.weight_quantizer is not None]


def describe(key: tuple[int, str], before: torch.Tensor, after: torch.Tensor, options: dict, kept: int) -> dict:
    """Return what is kept of some channels: the largest, and others evenly spaced.

    Args:
        key: block and name.
        before: the largest magnitude of each, (C,).
        after: likewise.
        options: of `largest_reserved`.
        kept: how many.
    """
    before, after = before.float(), after.float()
    ordered = before.sort().values
    chosen = torch.cat([before.topk(min(len(before), kept // 2)).indices, spaced(len(before), kept - kept // 2)])
    chosen = chosen.unique()
    return {
        "block": key[0],
        "name": key[1],
        "num_channels": len(before),
        "coarse_threshold": short(coarse_threshold(ordered[None], options.get("lambda1", 1.5)).item()),
        "threshold": short(largest_reserved(before[None], **options).item()),
        "channels": chosen.tolist(),
        "before": [short(value) for value in before[chosen].tolist()],
        "after": [short(value) for value in after[chosen].tolist()],
    }


def spaced(count: int, wanted: int) -> torch.Tensor:
    """Return at most `wanted` evenly spaced numbers from 0 to count - 1.

    Example:
        >>> spaced(10, 4).tolist()
        [0, 3, 6, 9]
    """
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def short(value: float) -> float:
    """Return a number without the digits that no picture shows.

    Example:
        >>> short(0.123456)
        0.1235
    """
    return float(f"{value:.{DIGITS}g}")


def watch_weights(folder: Path, blocks: nn.ModuleList, indices: Iterable[int]) -> None:
    """Write down how the weights of finished blocks, still in the learned state, lie on their grids.

    Args:
        folder: the run folder.
        blocks: the model's.
        indices: of the finished ones.
    """
    for index in indices:
        linears = {name: on_grid(linear) for name, linear in quantized_weights(blocks[index])}
        write_json(folder / FOLDER_NAME / "weights" / f"block_{index:03}.json", {"block": index, "linears": linears})


@torch.no_grad()
def on_grid(linear: QuantLinear) -> dict:
    """Return a histogram of W / s + z, from one integer below the grid to one above, and how often integers are taken.

    What lies outside counts in the outermost bins.
    """
    quantizer = linear.weight_quantizer
    scale, zero_point = quantizer.grid()
    low, high = quantizer.quant_min - 1, quantizer.quant_max + 1
    bins = (high - low) * BINS_AN_INTEGER
    bins = bins if bins <= MAX_BINS else high - low
    positions = (to_groups(linear.weight.float(), quantizer.group_size) / scale + zero_point).clamp(low, high)
    found = ((positions - low) * (bins // (high - low))).long().clamp_max(bins - 1)
    integers = torch.bincount(linear.integers().flatten().long(), minlength=quantizer.quant_max + 1)
    return {
        "low": low,
        "high": high,
        # Not histc, which CUDA refuses under deterministic=true.
        "weights": torch.bincount(found.flatten(), minlength=bins).tolist(),
        "integers": integers.tolist(),
    }


def write_texts(folder: Path, texts: dict[str, str]) -> None:
    """Write down what the model writes, by title."""
    write_json(folder / FOLDER_NAME / "texts.json", {"texts": texts})
