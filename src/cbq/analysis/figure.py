"""The paper's Figure 1: how weights of a linear, scales of blocks, and two neighbouring blocks depend on each other.

Shapes: N segments, T tokens, L blocks, n chosen weights, P points an axis.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from cbq.analysis.curvature import scale_hessian, weight_hessian
from cbq.analysis.dependence import (
    interaction_share,
    mean_by_distance,
    mean_off_diagonal,
    off_diagonal_mass,
    same_row_mass,
)
from cbq.analysis.schemes import named_linears, set_scheme_
from cbq.analysis.surface import loss_surface
from cbq.data.corpora import check_count
from cbq.errors import InputError, check_number, check_text
from cbq.evaluation.evaluation import show_nothing
from cbq.models.loading import LoadedModel
from cbq.preprocess.statistics import set_act_ranges_
from cbq.quant.scheme import QuantScheme

MOST_POINTS = 100


class Figure1:
    """Measures Figure 1 at several bit widths of the weights.

    Args:
        bits: of all weights, 2 to 8, one row of the figure each; the paper has a high and a low one.
        linear: whose weights are looked at, by its name in `quant.overrides`; None: the last of the middle block.
        rows: how many output channels the weights are in, spread evenly.
        columns: how many input channels, likewise.
        first_block: of the two neighbours whose scales span the surface.
        points: of the surface, an axis; at most 100: each pair of them is a pass over the segments.
        lowest: multiplier of the step sizes at the surface's one end; 1 is the range of the weights.
        highest: at its other end.

    Raises:
        InputError: something is out of range.
    """

    def __init__(
        self,
        bits: Sequence[int] = (4, 2),
        linear: str | None = None,
        rows: int = 6,
        columns: int = 6,
        first_block: int = 0,
        points: int = 7,
        lowest: float = 0.6,
        highest: float = 1.2,
    ) -> None:
        check_bits("figure.bits", bits)
        check_text("figure.linear", linear, optional=True)
        for name, value in (("rows", rows), ("columns", columns), ("points", points)):
            check_count(f"figure.{name}", value)
        if rows * columns < 2 or points < 2:
            raise InputError("figure needs two weights and figure.points of at least 2: there is nothing to compare")
        if points > MOST_POINTS:
            raise InputError(f"figure.points must be at most {MOST_POINTS}, got {points}")
        check_number("figure.lowest", lowest, least=0.05)
        check_number("figure.highest", highest, least=lowest)
        if isinstance(first_block, bool) or not isinstance(first_block, int) or first_block < 0:
            raise InputError(f"figure.first_block must be an integer of at least 0, got {first_block!r}")
        self.bits = list(bits)
        self.linear = linear
        self.num_rows, self.num_columns = rows, columns
        self.first_block = first_block
        self.multipliers = torch.linspace(lowest, highest, points, dtype=torch.float64).tolist()

    def check(self, loaded: LoadedModel) -> None:
        """Refuse a model that does not have what is asked for, before any work is done.

        Args:
            loaded: after `make_quantizable_`.

        Raises:
            InputError: it does not.
        """
        name, shape = self.chosen(loaded)
        for what, wanted, there in zip(("rows", "columns"), (self.num_rows, self.num_columns), shape, strict=True):
            if wanted > there:
                raise InputError(f"figure.{what} must be at most {there} for {name}, got {wanted}")
        if self.first_block > len(loaded.blocks) - 2:
            raise InputError(
                f"figure.first_block must be at most {len(loaded.blocks) - 2} in a model of {len(loaded.blocks)} "
                f"blocks, got {self.first_block}"
            )

    def chosen(self, loaded: LoadedModel) -> tuple[str, torch.Size]:
        """Return the name and the shape of the linear whose weights are looked at.

        Raises:
            InputError: there is none of this name.
        """
        linears = named_linears(loaded.blocks)
        middle = f"blocks.{len(loaded.blocks) // 2}."
        name = self.linear or [name for name in linears if name.startswith(middle)][-1]
        if name not in linears:
            raise InputError(f"figure.linear {name!r} is the name of no linear; names are like {next(iter(linears))}")
        return name, linears[name].weight.shape

    def measure(
        self,
        loaded: LoadedModel,
        scheme: QuantScheme,
        segments: torch.Tensor,
        track: Callable[[Sequence, str], Iterable] = show_nothing,
    ) -> dict[str, Any]:
        """Return what `analysis.json` says of Figure 1.

        Args:
            loaded: after `make_quantizable_`, on the device to work on; its linears end with the last of the bits.
            scheme: all but the bits of the weights.
            segments: token ids on the device, (N, T).
            track: shows how far a sequence is.
        """
        name, shape = self.chosen(loaded)
        rows, columns = spread(self.num_rows, shape[0]), spread(self.num_columns, shape[1])
        by_bits = {}
        for bits in track(self.bits, "Figure 1"):
            set_scheme_(loaded.blocks, replace(scheme, weight_bits=bits))
            set_act_ranges_(loaded.model, loaded.blocks, segments)
            linear = named_linears(loaded.blocks)[name]
            weights = weight_hessian(loaded.model, loaded.blocks, linear, rows, columns, segments)
            scales = scale_hessian(loaded.model, loaded.blocks, segments)
            surface = loss_surface(loaded.model, loaded.blocks, self.first_block, self.multipliers, segments)
            by_bits[str(bits)] = {
                "weights": hessian_figures(weights) | {"same_output_mass": same_row_mass(weights, len(columns))},
                "scales": hessian_figures(scales) | {"by_distance": mean_by_distance(scales)},
                "surface": surface_figures(surface, self.multipliers),
            }
        return {
            "linear": name,
            "rows": rows,
            "columns": columns,
            "first_block": self.first_block,
            "multipliers": self.multipliers,
            "by_bits": by_bits,
        }


def check_bits(key: str, bits: Sequence[int]) -> None:
    """Refuse what is no list of different bit widths.

    Raises:
        InputError: it is not.
    """
    listed = isinstance(bits, Sequence) and not isinstance(bits, str) and len(bits) > 0
    if not listed or any(isinstance(b, bool) or b not in range(2, 9) for b in bits) or len(set(bits)) < len(bits):
        raise InputError(f"{key} must be a list of different numbers of 2 to 8, got {bits!r}")


def spread(number: int, size: int) -> list[int]:
    """Return so many indices below `size`, evenly spread.

    Example:
        >>> spread(3, 12)
        [2, 6, 10]
    """
    return [(2 * index + 1) * size // (2 * number) for index in range(number)]


def hessian_figures(hessian: torch.Tensor) -> dict[str, Any]:
    """Return a Hessian (n, n) as lists, and what is on its diagonal and off it."""
    return {
        "hessian": hessian.tolist(),
        "off_diagonal_mass": off_diagonal_mass(hessian),
        "mean_diagonal": float(hessian.double().diagonal().abs().mean()),
        "mean_off_diagonal": mean_off_diagonal(hessian),
    }


def surface_figures(surface: torch.Tensor, multipliers: Sequence[float]) -> dict[str, Any]:
    """Return a loss surface (P, P) as lists, its interaction, its lowest point, and where each scale alone is best.

    `best_alone` has the multiplier of each block that is best with the other one's at that closest to 1, and
    `loss_best_alone` the loss of both together: above that of `best` where the blocks depend on each other.
    """
    unchanged = min(range(len(multipliers)), key=lambda index: abs(multipliers[index] - 1))
    best = divmod(int(surface.argmin()), len(multipliers))
    alone = int(surface[:, unchanged].argmin()), int(surface[unchanged].argmin())
    return {
        "loss": surface.tolist(),
        "interaction_share": interaction_share(surface),
        "best": [multipliers[index] for index in best],
        "loss_best": float(surface[best]),
        "best_alone": [multipliers[index] for index in alone],
        "loss_best_alone": float(surface[alone]),
        "loss_unchanged": float(surface[unchanged, unchanged]),
    }
