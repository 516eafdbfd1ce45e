"""Numbers of a matrix, on matrices whose numbers are known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cbq.analysis.dependence import (
    interaction_share,
    mean_by_distance,
    mean_off_diagonal,
    off_diagonal_mass,
    same_row_mass,
)

SEEDS = st.integers(0, 10_000)


@given(SEEDS, st.integers(2, 6))
def test_masses_against_sums_over_pairs(seed, size):
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    matrix = matrix + matrix.T
    pairs = [(i, j, abs(float(matrix[i, j]))) for i in range(size) for j in range(size)]
    off = [value for i, j, value in pairs if i != j]
    assert off_diagonal_mass(matrix) == pytest.approx(sum(off) / sum(value for *_, value in pairs))
    assert off_diagonal_mass(matrix * 1e-6) == pytest.approx(off_diagonal_mass(matrix))
    assert mean_off_diagonal(matrix) == pytest.approx(sum(off) / len(off))
    for distance, found in enumerate(mean_by_distance(matrix)):
        values = [value for i, j, value in pairs if j - i == distance]
        assert found == pytest.approx(sum(values) / len(values))


@given(SEEDS)
def test_a_sum_has_no_interaction_and_a_product_has_nothing_else(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    assert interaction_share(first[:, None] + second[None]) == pytest.approx(0, abs=1e-12)
    first, second = first - first.mean(), second - second.mean()
    assert interaction_share(first[:, None] * second[None] + 3) == pytest.approx(1)
    half = first[:, None] * second[None] / (first.norm() * second.norm()) + first[:, None] / first.norm() / 5**0.5
    assert interaction_share(half) == pytest.approx(0.5)


def test_of_nothing_there_is_no_share():
    """Weights whose input is never there have no curvature at all."""
    nothing = torch.zeros(4, 4)
    assert off_diagonal_mass(nothing) == interaction_share(nothing) == same_row_mass(nothing, 2) == 0
