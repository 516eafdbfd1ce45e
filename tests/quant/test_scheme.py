"""What may be asked of a scheme, and how it is called."""

import dataclasses

import pytest

from cbq.errors import InputError
from cbq.quant.scheme import QuantScheme


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"weight_bits": 4, "act_bits": 4}, "W4A4"),
        ({"weight_bits": 2, "act_bits": 16}, "W2A16"),
        ({"weight_bits": 2, "act_bits": 16, "group_size": 64}, "W2A16g64"),
        ({"weight_bits": 16, "act_bits": 8, "act_symmetric": True}, "W16A8"),
        ({"weight_bits": 4, "act_bits": 8, "group_size": 32, "qkv_bits": 6}, "W4A8g32-qkv6"),
        ({"weight_bits": 3, "act_bits": 5, "group_size": 1, "symmetric": True}, "W3A5g1"),
    ],
)
def test_label(options, label):
    assert QuantScheme(**options).label == label


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_what_is_quantized(bits):
    weights, activations = QuantScheme(bits, 16), QuantScheme(16, bits)
    assert weights.quantizes_weights == activations.quantizes_activations == (bits < 16)
    assert not weights.quantizes_activations
    assert not activations.quantizes_weights


@pytest.mark.parametrize("key", ["weight_bits", "act_bits", "qkv_bits"])
@pytest.mark.parametrize("value", [-4, 0, 1, 9, 15, 17, 32, True, "4", None, 4.5, 4.0, float("nan"), [4]], ids=repr)
def test_bits_out_of_range(key, value):
    with pytest.raises(InputError, match=rf"quant\.{key} "):
        QuantScheme(**({"weight_bits": 4, "act_bits": 4} | {key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("group_size", value) for value in (0, -2, True, "64", 64.0, None)],
        *[(key, value) for key in ("symmetric", "act_symmetric") for value in (0, 1, "true", None)],
        *[("act_denominator", value) for value in (0, -7, 8, 7.25, 15, "7", float("nan"))],
    ],
    ids=repr,
)
def test_other_options_out_of_range(key, value):
    options = {"weight_bits": 4, "act_bits": 4, "act_symmetric": True}
    with pytest.raises(InputError, match=rf"quant\.{key} "):
        QuantScheme(**(options | {key: value}))


@pytest.mark.parametrize("options", [{"act_bits": 4}, {"act_bits": 16, "act_symmetric": True}])
def test_denominator_needs_symmetric_activations(options):
    with pytest.raises(InputError, match=r"quant\.act_denominator"):
        QuantScheme(weight_bits=4, act_denominator=7, **options)


@pytest.mark.parametrize("denominator", [7, 7.0, 7.5])
def test_denominators_in_use(denominator):
    assert QuantScheme(4, 4, act_symmetric=True, act_denominator=denominator).act_denominator == denominator


def test_scheme_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantScheme(4, 4).weight_bits = 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"weight_bits": 4}, "must each be"),
        ("blocks.0", "must each be"),
        ({"linears": 3, "weight_bits": 4}, "must each be"),
        ({"linears": "(", "weight_bits": 4}, "is no regular expression"),
        ({"linears": ".*", "weigth_bits": 4}, "may set weight_bits, act_bits, .*, got weigth_bits"),
        ({"linears": ".*", "overrides": []}, "may set"),
        ({"linears": ".*", "weight_bits": 12}, "quant.weight_bits must be 2 to 8, or 16"),
    ],
    ids=repr,
)
def test_overrides_out_of_range(override, message):
    with pytest.raises(InputError, match=message):
        QuantScheme(2, 16, overrides=[override])


def test_overrides_show_in_the_label():
    assert QuantScheme(2, 16, overrides=[{"linears": ".*", "weight_bits": 4}]).label == "W2A16*"


def test_act_granularity_out_of_range():
    with pytest.raises(InputError, match=r"quant\.act_granularity must be one of token, tensor, got 'channel'"):
        QuantScheme(4, 4, act_granularity="channel")
