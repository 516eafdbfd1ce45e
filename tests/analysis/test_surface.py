"""The loss surface against a plain model whose weights are rounded by hand at every point."""

import copy

import pytest
import torch
from analysis.conftest import loss_of, nearest

from cbq.analysis.figure import surface_figures
from cbq.analysis.surface import loss_surface
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quantized_modules


def test_every_point_is_rounded_anew(make_pair):
    pair = make_pair(QuantScheme(2, 16))
    multipliers = [0.7, 1.0, 1.2]
    found = loss_surface(pair.loaded.model, pair.loaded.blocks, 1, multipliers, pair.segments)
    for row, mine in enumerate(multipliers):
        for column, other in enumerate(multipliers):
            model = copy.deepcopy(pair.plain)
            for name, linear in pair.linears(model).items():
                factor = {"1": mine, "2": other}.get(name.split(".")[1], 1.0)
                linear.weight.data = nearest(linear.weight, 2, factor)
            assert float(found[row, column]) == pytest.approx(float(loss_of(model, pair.segments)), rel=1e-5)
    assert found.unique().numel() == 9
    modules = quantized_modules(pair.loaded.blocks)
    assert all(module.state is QuantState.FULL_PRECISION for module in modules)
    assert all((module.weight_quantizer.step_size.multiplier == 1).all() for module in modules)


def test_where_it_is_lowest_together_and_alone():
    # Alone the second coordinate stays at 1; together the valley runs to the corner.
    surface = torch.tensor([[1.0, 4.0, 5.0], [3.0, 3.5, 3.0], [6.0, 3.2, 9.0]], dtype=torch.float64)
    found = surface_figures(surface, [0.5, 1.0, 1.5])
    assert (found["best"], found["loss_best"]) == ([0.5, 0.5], 1.0)
    assert (found["best_alone"], found["loss_best_alone"]) == ([1.5, 0.5], 6.0)
    assert found["loss_unchanged"] == 3.5
