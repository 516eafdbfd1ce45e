"""Bits for linears against brute force, and overrides against the scheme and the command line that read them."""

from itertools import product

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from cbq.analysis.allocation import allocate, option_of, overrides_of
from cbq.analysis.schemes import all_names
from cbq.errors import InputError
from cbq.quant.scheme import QuantScheme

WIDTHS = (2, 3, 4)
ERRORS = st.lists(st.tuples(*[st.floats(0, 10)] * 3), min_size=1, max_size=5)
SIZES = st.lists(st.sampled_from([100, 257, 768]), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ERRORS, SIZES, st.floats(0, 1))
def test_the_least_error_that_the_budget_buys(triples, sizes, share):
    errors = [dict(zip(WIDTHS, triple, strict=True)) for triple in triples]
    costs = [{width: size * (width * 64 + 16) for width in WIDTHS} for size in sizes[: len(errors)]]
    least, most = (sum(cost[width] for cost in costs) for width in (2, 4))
    budget = int(least + share * (most - least))
    chosen = allocate(errors, costs, budget)

    def total(figures, widths):
        return sum(figure[width] for figure, width in zip(figures, widths, strict=True))

    affordable = [widths for widths in product(WIDTHS, repeat=len(errors)) if total(costs, widths) <= budget]
    assert total(costs, chosen) <= budget
    assert total(errors, chosen) == pytest.approx(min(total(errors, widths) for widths in affordable), abs=1e-5)


def test_a_budget_of_billions_is_kept_to_the_bit():
    """The costs of a model of seven billion weights, which no tolerance of a solver may round."""
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    costs = [{width: o * i * width + o * (16 + width) for width in WIDTHS} for o, i in shapes * 8]
    errors = [{2: 1 + (7 * n % 13), 3: 0.3 + 0.01 * (n % 5), 4: 0.05} for n in range(len(costs))]
    budget = sum(cost[3] for cost in costs)
    chosen = allocate(errors, costs, budget)
    assert sum(cost[width] for cost, width in zip(costs, chosen, strict=True)) <= budget
    found = sum(error[width] for error, width in zip(errors, chosen, strict=True))
    assert found < sum(error[3] for error in errors)


def test_what_broke_the_model_is_not_chosen():
    errors = [{2: float("nan"), 3: float("inf"), 4: 5.0}]
    assert allocate(errors, [{2: 2, 3: 3, 4: 4}], budget=4) == [4]
    with pytest.raises(InputError, match="within the budget"):
        allocate(errors, [{2: 2, 3: 3, 4: 4}], budget=3)


NAMES = [
    f"blocks.{block}.{linear}"
    for block in range(12)
    for linear in ("self_attn.q_proj", "mlp.down_proj", "mlp.experts.1.up", "mlp.experts.11.up")
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([2, 3, 4, 8]), min_size=len(NAMES), max_size=len(NAMES)))
def test_overrides_say_what_was_allocated_also_through_the_command_line(widths):
    wanted = dict(zip(NAMES, widths, strict=True))
    overrides = overrides_of(wanted, usual=3)
    typed = OverridesParser.create().parse_override(option_of(overrides))
    assert typed.key_or_group == "quant.overrides"
    read = [{str(key): value for key, value in entry.items()} for entry in typed.value()]
    scheme = QuantScheme(3, 16, overrides=[{**entry, "linears": str(entry["linears"])} for entry in read])
    assert {name: scheme.of_linear(all_names(name, 12)).weight_bits for name in NAMES} == wanted


def test_nothing_to_say():
    assert option_of(overrides_of({"blocks.0.a": 3}, usual=3)) == "quant.overrides=[]"
