"""The paired test against brute force over every way that chance could have gone."""

import itertools
import math
import random
import statistics

import pytest

from cbq.evaluation.paired import mean_difference, paired_difference


def brute_force_p(differences: list[float]) -> float:
    """Return the share of all sign patterns of the changed items that are as one-sided as what was seen."""
    changed = [value for value in differences if value]
    seen = abs(sum(1 if value > 0 else -1 for value in changed))
    patterns = list(itertools.product((1, -1), repeat=len(changed)))
    return sum(abs(sum(pattern)) >= seen for pattern in patterns) / len(patterns)


@pytest.mark.parametrize("seed", range(8))
def test_p_value_is_that_of_all_sign_patterns(seed):
    generator = random.Random(seed)
    before = [generator.randint(0, 1) for _ in range(14)]
    after = [generator.randint(0, 1) for _ in range(14)]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    found = paired_difference(before, after)
    assert found.p_value == pytest.approx(brute_force_p(differences))
    assert found.mean == pytest.approx(statistics.mean(differences))
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(14))
    assert (found.num_higher, found.num_lower) == (differences.count(1), differences.count(-1))


def test_pairing_sees_what_two_standard_errors_do_not():
    """Ten items of 400 fall, none rises: two accuracies within each other's errors, and yet no chance."""
    before = [1.0] * 240 + [0.0] * 160
    after = [1.0] * 230 + [0.0] * 170
    found = paired_difference(before, after)
    accuracy_stderr = math.sqrt(0.6 * 0.4 / 400)
    assert abs(found.mean) < accuracy_stderr * 1.1
    assert found.p_value < 0.01


def test_nothing_changed():
    found = paired_difference([1, 0, 1], [1, 0, 1])
    assert (found.mean, found.stderr, found.p_value) == (0, 0, 1)


def test_items_must_be_the_same():
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1, 0], [1])


def test_mean_of_tasks_weighs_tasks_and_not_items():
    small, large = paired_difference([1, 1], [0, 1]), paired_difference([0] * 100, [1] * 50 + [0] * 50)
    found = mean_difference([small, large])
    assert found.mean == pytest.approx((-0.5 + 0.5) / 2)
    assert found.stderr == pytest.approx(math.sqrt(small.stderr**2 + large.stderr**2) / 2)
    assert (found.num_higher, found.num_lower) == (50, 1)
