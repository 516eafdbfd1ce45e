"""What may be asked of Figure 1, and of the bits."""

import pytest

from cbq.analysis.figure import Figure1, spread
from cbq.analysis.schemes import effective_bits, set_scheme_
from cbq.analysis.suggestion import MixedBits
from cbq.errors import InputError
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quantized_modules


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": []}, "figure.bits must be a list of different numbers of 2 to 8"),
        ({"bits": [16, 2]}, "figure.bits"),
        ({"bits": [2, 2]}, "figure.bits"),
        ({"bits": "42"}, "figure.bits"),
        ({"rows": 1, "columns": 1}, "two weights"),
        ({"points": 1}, "figure.points of at least 2"),
        ({"rows": 0}, "figure.rows"),
        ({"lowest": 0.0}, "figure.lowest"),
        ({"lowest": 1.2, "highest": 1.0}, "figure.highest"),
        ({"first_block": -1}, "figure.first_block"),
        ({"linear": 3}, "figure.linear"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(InputError, match=said):
        Figure1(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"linear": "blocks.0.mlp.up"}, "is the name of no linear; names are like blocks.0.self_attn.q_proj"),
        ({"rows": 9}, "figure.rows must be at most 8 for blocks.1.mlp.down_proj"),
        ({"columns": 17}, "figure.columns must be at most 16"),
        ({"first_block": 2}, "figure.first_block must be at most 1 in a model of 3 blocks"),
    ],
)
def test_a_model_that_does_not_have_it(make_pair, options, said):
    with pytest.raises(InputError, match=said):
        Figure1(**options).check(make_pair(QuantScheme(3, 16)).loaded)


def test_indices_are_spread_and_different():
    for size in (1, 5, 64):
        for number in range(1, size + 1):
            indices = spread(number, size)
            assert len(set(indices)) == number
            assert min(indices) >= 0
            assert max(indices) < size


def test_a_scheme_set_anew_is_the_scheme_made_at_first(make_pair):
    overrides = [{"linears": r"blocks[.]-1[.]mlp[.].*", "weight_bits": 8, "group_size": 4}]
    wanted = QuantScheme(2, 16, overrides=overrides)
    changed, fresh = make_pair(QuantScheme(4, 8)).loaded, make_pair(wanted).loaded
    set_scheme_(changed.blocks, wanted)
    assert effective_bits(changed.blocks) == effective_bits(fresh.blocks)
    for one, other in zip(quantized_modules(changed.blocks), quantized_modules(fresh.blocks), strict=True):
        assert one.scheme == other.scheme
        assert one.state is QuantState.FULL_PRECISION
        assert (one.weight_quantizer.nearest(one.weight) == other.weight_quantizer.nearest(other.weight)).all()


@pytest.mark.parametrize(("bits", "budget", "said"), [([1], None, "scan.bits"), ([2], -1.0, "scan.budget")])
def test_bits_out_of_range(bits, budget, said):
    with pytest.raises(InputError, match=said):
        MixedBits(bits, budget)


def test_a_budget_below_the_narrowest(make_pair):
    blocks = make_pair(QuantScheme(3, 16)).loaded.blocks
    with pytest.raises(InputError, match=r"scan.budget must be at least \d\.\d{4}: 2 bits everywhere"):
        MixedBits([2, 3], 2.1).budget_bits(blocks, QuantScheme(3, 16))


def test_a_budget_is_that_of_the_scheme_or_what_is_said(make_pair):
    """Rows of 8 weights: 3 bits, and a 16-bit scale and a 3-bit zero point for each row of 8 or of 16."""
    blocks = make_pair(QuantScheme(3, 16)).loaded.blocks
    weights = sum(module.weight.numel() for module in quantized_modules(blocks))
    rows = sum(module.out_features for module in quantized_modules(blocks))
    assert MixedBits().budget_bits(blocks, QuantScheme(3, 16)) == 3 * weights + 19 * rows
    assert MixedBits(budget=5.0).budget_bits(blocks, QuantScheme(3, 16)) == 5 * weights
