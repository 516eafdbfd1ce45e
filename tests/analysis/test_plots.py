"""Pictures of what is not usual."""

import math

import pytest

from cbq.analysis.plots import plot_figure, plot_sensitivity


def figure(value: float) -> dict:
    matrix = [[value, 0.0], [0.0, value]]
    parts = {
        part: {
            "hessian": matrix,
            "off_diagonal_mass": 0.0,
            "interaction_share": 0.0,
            "loss": matrix,
            "best": [1.0, 1.0],
        }
        for part in ("weights", "scales", "surface")
    }
    options = {"linear": "blocks.0.a", "columns": [0, 1], "first_block": 0, "multipliers": [0.5, 1.0]}
    return options | {"by_bits": {"2": parts}}


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_matrix_of_nothing_and_a_broken_one(tmp_path, value):
    assert plot_figure(figure(value), tmp_path) == ["figure1.png", "figure1.svg"]
    assert {path.name for path in tmp_path.iterdir()} == {"figure1.png", "figure1.svg"}


@pytest.mark.parametrize("divergence", [0.0, math.nan])
def test_blocks_of_different_linears(tmp_path, divergence):
    """A mixture has experts in some blocks only."""
    names = ("blocks.0.mlp.up", "blocks.1.mlp.experts.0.up")
    found = {"linears": {name: {"2": {"kl_divergence": divergence}} for name in names}}
    suggestion = {"weight_bits": dict.fromkeys(names, 2), "effective_bits": 2.0}
    assert plot_sensitivity(found, suggestion, tmp_path) == ["sensitivity.png", "sensitivity.svg"]
    assert len(list(tmp_path.iterdir())) == 2
