"""Which linear gets how many bits: the least sum of errors that a budget buys, as `quant.overrides`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import gcd, isfinite

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from cbq.errors import InputError

SECONDS = 60  # the solver's limit: after it the best allocation found is taken


def allocate(errors: Sequence[Mapping[int, float]], costs: Sequence[Mapping[int, int]], budget: int) -> list[int]:
    """Choose one bit width for each linear, so that the sum of errors is least and that of costs at most the budget.

    The multiple-choice knapsack problem, solved exactly as an integer program (SciPy's HiGHS). It adds errors up as if
    linears did not depend on each other, which at low bits is not so: the choice has to be measured.

    Args:
        errors: of each linear by bit width; one that is not finite is never chosen.
        costs: likewise, in bits.
        budget: in bits.

    Returns:
        the width of each linear.

    Raises:
        InputError: no choice is within the budget.

    Example:
        >>> errors = [{2: 9.0, 3: 1.0}, {2: 3.0, 3: 0.5}]
        >>> allocate(errors, costs=[{2: 2, 3: 3}, {2: 2, 3: 3}], budget=5)
        [3, 2]
    """
    choices = [
        (number, width, error, costs[number][width])
        for number, of_linear in enumerate(errors)
        for width, error in of_linear.items()
        if isfinite(error)
    ]
    price = np.array([cost for *_, cost in choices], dtype=np.int64)
    unit = gcd(budget, *price.tolist())  # small integers, which the solver's tolerances do not touch
    price //= unit
    budget //= unit
    largest = max((error for *_, error, _ in choices), default=1.0) or 1.0
    one_each = np.zeros((len(errors), len(choices)))
    for column, (number, *_) in enumerate(choices):
        one_each[number, column] = 1
    limit = budget
    while True:
        found = milp(
            [error / largest for *_, error, _ in choices],
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(price[None, :], -np.inf, limit)],
            options={"mip_rel_gap": 0, "time_limit": SECONDS},
        )
        if found.x is None:
            raise InputError("no allocation of bits is within the budget")
        taken = found.x > 0.5
        excess = int(price[taken].sum()) - budget
        if excess <= 0:
            return [width for (_, width, *_), chosen in zip(choices, taken, strict=True) if chosen]
        limit -= excess  # within the solver's tolerance, but not within the budget


def overrides_of(widths: Mapping[str, int], usual: int) -> list[dict]:
    """Return `quant.overrides` that give linears their bit widths: one entry a width.

    Args:
        widths: by the name of the linear, `blocks.0.mlp.down_proj`.
        usual: `quant.weight_bits`; linears of this width need no entry.

    Example:
        >>> overrides_of({"blocks.0.mlp.up": 4, "blocks.1.mlp.up": 4, "blocks.0.attn.q": 3, "blocks.1.attn.q": 2}, 3)
        ... # doctest: +NORMALIZE_WHITESPACE
        [{'linears': 'blocks[.]1[.]attn[.]q', 'weight_bits': 2},
         {'linears': 'blocks[.](0|1)[.]mlp[.]up', 'weight_bits': 4}]
    """
    wanted: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, width in widths.items():
        _, index, inner = name.split(".", 2)
        wanted[width][inner].append(index)
    overrides = []
    for width in sorted(set(wanted) - {usual}):
        parts = [f"{either(indices)}.{inner}" for inner, indices in wanted[width].items()]
        # A class of one character, not a backslash: shells, hydra and YAML all leave it alone.
        overrides.append({"linears": f"blocks.{either(parts)}".replace(".", "[.]"), "weight_bits": width})
    return overrides


def either(alternatives: Sequence[str]) -> str:
    """Return a pattern that matches any of some.

    Example:
        >>> either(["1"]), either(["1", "2"])
        ('1', '(1|2)')
    """
    return alternatives[0] if len(alternatives) == 1 else f"({'|'.join(alternatives)})"


def option_of(overrides: Sequence[Mapping]) -> str:
    """Return overrides as an option of the command line, before the shell's own quotes.

    Example:
        >>> print(option_of([{"linears": "blocks[.]0[.].*", "weight_bits": 4}]))
        quant.overrides=[{linears: "blocks[.]0[.].*", weight_bits: 4}]
    """
    entries = [f'{{linears: "{each["linears"]}", weight_bits: {each["weight_bits"]}}}' for each in overrides]
    return f"quant.overrides=[{', '.join(entries)}]"
