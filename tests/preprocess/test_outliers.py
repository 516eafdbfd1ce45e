"""Algorithm 1 against a double loop over every split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbq.preprocess.outliers import coarse_threshold, largest_reserved


def largest_reserved_by_hand(values: list[float], lambda1: float, lambda2: float, literal: bool) -> float:
    """Try every split of the sorted values whose upper part lies above T."""
    ordered = np.sort(np.array(values, dtype=np.float64))
    n = len(ordered)
    first, third = ordered[n // 4], ordered[min(3 * n // 4, n - 1)]
    threshold = third + lambda1 * (third - first)
    best, answer = 0.0, ordered[-1]
    for split in range(1, n):
        reserved = ordered[:split]
        if literal:
            reserved = reserved[reserved > threshold]
        if ordered[split] <= threshold or not len(reserved):
            continue
        metric = (ordered[split] - reserved[-1]) ** 2 - lambda2 * np.var(reserved)
        if metric > best:
            best, answer = metric, reserved[-1]
    return float(answer)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("lambda2", [0.0, 1.0, 5.0])
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 40) | st.integers(200, 1000), min_size=1, max_size=30), scale=st.floats(0.1, 3))
def test_equals_every_split(values: list[int], scale: float, lambda2: float, literal: bool) -> None:
    # Products with one float keep the metrics of different splits apart, or exactly equal.
    numbers = torch.tensor(values, dtype=torch.float64)
    actual = largest_reserved(numbers[None], 1.5, lambda2, "coarse" if literal else "all")
    assert actual.item() == largest_reserved_by_hand(numbers.tolist(), 1.5, lambda2, literal)
    # No unit is special.
    assert largest_reserved(numbers[None] * scale, 1.5, lambda2, "coarse" if literal else "all").item() in (
        numbers * scale
    )


@pytest.mark.parametrize("literal", [False, True])
def test_rows_are_searched_on_their_own(literal: bool) -> None:
    values = torch.distributions.StudentT(2.0).sample((20, 300)).abs()
    expected = [largest_reserved_by_hand(row.tolist(), 1.5, 1.0, literal) for row in values]
    actual = largest_reserved(values, reserved="coarse" if literal else "all")
    assert actual.tolist() == pytest.approx(expected)


def test_threshold_by_hand() -> None:
    # Twelve values: the fourth and the tenth are the quartiles.
    ordered = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    assert coarse_threshold(ordered, 1.5).item() == 10 + 1.5 * 6
    assert coarse_threshold(ordered, 0.0).item() == 10


def test_few_or_none_in_light_tails_and_all_of_a_far_cluster() -> None:
    torch.manual_seed(0)
    gaussian = torch.randn(50, 4096).abs()
    found = (gaussian > largest_reserved(gaussian)[:, None]).sum(-1)
    assert found.max() <= 1
    assert found.float().mean() < 0.2
    # The literal reading cuts a Gaussian close to T in some rows (METHOD 7).
    literal = (gaussian > largest_reserved(gaussian, reserved="coarse")[:, None]).sum(-1)
    assert literal.max() > 20
    with_outliers = torch.cat([gaussian, 30 + torch.rand(50, 5)], dim=1)
    assert ((with_outliers > largest_reserved(with_outliers)[:, None]).sum(-1) == 5).all()


def test_constant_and_single_values_have_no_outliers() -> None:
    assert largest_reserved(torch.full((1, 9), 3.0)).item() == 3.0
    assert largest_reserved(torch.tensor([[7.0]])).item() == 7.0
    assert largest_reserved(torch.zeros(2, 4)).tolist() == [0.0, 0.0]


def test_large_numbers_keep_their_digits() -> None:
    values = torch.tensor([[1e6 + offset for offset in range(30)] + [1e6 + 200.0, 1e6 + 201.0]])
    assert largest_reserved(values).item() == 1e6 + 29
