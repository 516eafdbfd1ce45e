"""Pictures of what is not usual."""

import math

from cbq.analysis.plots import plot_figure, plot_sensitivity


def found(value: float) -> dict:
    matrix = [[value, 0.0], [0.0, value]]
    hessian = {"hessian": matrix, "off_diagonal_mass": 0.0}
    surface = {"loss": matrix, "interaction_share": 0.0, "best": [1.0, 1.0]}
    return {"weights": hessian, "scales": hessian, "surface": surface}


def test_a_matrix_of_nothing_and_a_broken_one(tmp_path):
    figure = {"linear": "blocks.0.a", "columns": [0, 1], "first_block": 0, "multipliers": [0.5, 1.0]}
    figure["by_bits"] = {"4": found(0.0), "2": found(math.nan)}
    assert plot_figure(figure, tmp_path) == ["figure1.png", "figure1.svg"]
    assert {path.name for path in tmp_path.iterdir()} == {"figure1.png", "figure1.svg"}


def test_blocks_of_different_linears_of_which_one_broke_the_model(tmp_path):
    """A mixture has experts in some blocks only."""
    divergences = {"blocks.0.mlp.up": 0.0, "blocks.1.mlp.experts.0.up": math.nan}
    linears = {name: {"2": {"kl_divergence": divergence}} for name, divergence in divergences.items()}
    suggestion = {"weight_bits": dict.fromkeys(divergences, 2), "effective_bits": 2.0}
    assert plot_sensitivity({"linears": linears}, suggestion, tmp_path) == ["sensitivity.png", "sensitivity.svg"]
    assert len(list(tmp_path.iterdir())) == 2
