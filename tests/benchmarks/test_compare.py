"""What counts as worse."""

import pytest

from benchmarks.compare import other_machine, verdict
from benchmarks.rows import Row


def row(*samples: float, **options: object) -> Row:
    return Row("step", "A / B", "pico", samples, **options)


@pytest.mark.parametrize(
    ("now", "then", "expected"),
    [
        ((1.30, 1.31, 1.32), (1.00, 1.01, 1.02), "worse"),
        ((1.00, 1.01, 1.02), (1.30, 1.31, 1.32), "better"),
        ((1.00, 1.01, 1.02), (1.00, 1.01, 1.02), "same"),
        ((1.00, 1.20, 1.40), (1.00, 1.01, 1.02), "same"),  # within this run's own noise
        ((1.20, 1.21, 1.22), (0.80, 1.01, 1.22), "same"),  # within the baseline's
        ((1.01, 1.01, 1.01), (1.00, 1.00, 1.00), "same"),  # no noise seen within either: 2 % between them
        ((1.03, 1.03, 1.03), (1.00, 1.00, 1.00), "worse"),
        ((1.09,), (1.00,), "same"),  # taken once
        ((1.12,), (1.00,), "worse"),
        ((0.08,), (0.00,), "same"),  # an exponent of about 0, taken once
        ((0.12,), (0.00,), "worse"),
    ],
)
def test_verdict(now, then, expected):
    assert verdict(row(*now), row(*then)) == expected


def test_what_is_not_judged_or_new():
    assert verdict(row(9.0, 9.0, judged=False), row(1.0, 1.0)) == ""
    assert verdict(row(9.0, 9.0), None) == "new"


def test_another_machine_is_named():
    now = {"device": "cpu", "threads": 2, "git_commit": "b"}
    assert other_machine(now, now | {"git_commit": "a"}) is None
    assert other_machine(now, now | {"threads": 1}) == "the baseline is of another machine: threads 1 -> 2"
