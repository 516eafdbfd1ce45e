"""A budget of average bits spent where it helps most."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from cbq.analysis.allocation import allocate, option_of, overrides_of
from cbq.analysis.figure import check_bits
from cbq.analysis.schemes import named_linears
from cbq.errors import InputError, check_number
from cbq.quant.scheme import QuantScheme


class MixedBits:
    """Finds `quant.overrides` for a budget.

    Args:
        bits: that a linear's weight may have, 2 to 8.
        budget: bits stored a weight on average, scales and zero points counted (`effective_bits` of `results.json`);
            None: those of the scheme.

    Raises:
        InputError: something is out of range.
    """

    def __init__(self, bits: Sequence[int] = (2, 3, 4), budget: float | None = None) -> None:
        check_bits("scan.bits", bits)
        if budget is not None:
            check_number("scan.budget", budget)
        self.bits = list(bits)
        self.budget = budget

    def costs(self, blocks: nn.ModuleList, scheme: QuantScheme) -> dict[str, dict[int, int]]:
        """Return the bits that each linear takes at each width, by name."""
        return {
            name: {
                width: replace(scheme, weight_bits=width).stored_bits(linear.out_features, linear.in_features)
                for width in self.bits
            }
            for name, linear in named_linears(blocks).items()
        }

    def budget_bits(self, blocks: nn.ModuleList, scheme: QuantScheme) -> int:
        """Return the budget of all linears together, in whole bits.

        Raises:
            InputError: the narrowest width of every linear takes more.
        """
        linears = named_linears(blocks).values()
        weights = sum(linear.weight.numel() for linear in linears)
        budget = sum(scheme.stored_bits(linear.out_features, linear.in_features) for linear in linears)
        if self.budget is not None:
            budget = int(self.budget * weights)
        least = sum(min(cost.values()) for cost in self.costs(blocks, scheme).values())
        if budget < least:
            raise InputError(
                f"scan.budget must be at least {least / weights:.4f}: {min(self.bits)} bits everywhere, with scales "
                f"and zero points; got {budget / weights:.4f}"
            )
        return budget

    def suggest(
        self, blocks: nn.ModuleList, scheme: QuantScheme, linears: Mapping[str, Mapping[str, Mapping[str, float]]]
    ) -> dict[str, Any]:
        """Return what `analysis.json` says of the bits that the budget buys.

        Args:
            blocks: of the model, quantizable.
            scheme: all but the bits of the weights.
            linears: what `scan` found, by name and width: their KL divergences are added up.
        """
        costs, budget = self.costs(blocks, scheme), self.budget_bits(blocks, scheme)
        errors = {name: {width: linears[name][str(width)]["kl_divergence"] for width in self.bits} for name in costs}
        chosen = allocate(list(errors.values()), list(costs.values()), budget)
        widths = dict(zip(costs, chosen, strict=True))
        weights = sum(linear.weight.numel() for linear in named_linears(blocks).values())
        overrides = overrides_of(widths, scheme.weight_bits)
        return {
            "budget": budget / weights,
            "effective_bits": sum(costs[name][width] for name, width in widths.items()) / weights,
            "kl_divergence_sum": sum(errors[name][width] for name, width in widths.items()),
            "weight_bits": widths,
            "overrides": overrides,
            "option": option_of(overrides),
        }
