"""Every plan of every small model."""

import itertools

import pytest

from cbq.errors import InputError
from cbq.reconstruction.windows import SlidingWindows

PLANS = [
    (num_blocks, window, overlap)
    for num_blocks in range(1, 13)
    for window in range(1, num_blocks + 1)
    for overlap in range(window)
]


@pytest.mark.parametrize("rounding_blocks", ["window", "overlap"])
def test_every_plan(rounding_blocks):
    for num_blocks, window, overlap in PLANS:
        if rounding_blocks == "overlap" and overlap == 0:
            continue  # refused
        plan = SlidingWindows(window, overlap, rounding_blocks).plan(num_blocks)
        blocks = [set(range(w.start, w.stop)) for w in plan]
        assert set().union(*blocks) == set(range(num_blocks)), "every block is covered"
        assert plan[-1].stop == num_blocks
        assert [w.start for w in plan] == [i * (window - overlap) for i in range(len(plan))]
        assert all(w.stop < num_blocks for w in plan[:-1]), "no window after the one that reaches the end"
        assert all(len(w) == w.stop - w.start == window for w in plan[:-1])
        assert 1 <= len(plan[-1]) <= window
        for first, second in itertools.pairwise(blocks):
            assert second - first, "every window brings a new block"
            assert len(first & second) == overlap


def test_finished_blocks_are_a_partition_in_order():
    for num_blocks, window, overlap in PLANS:
        plan = SlidingWindows(window, overlap).plan(num_blocks)
        finished = [block for w in plan for block in range(w.start, w.finished)]
        assert finished == list(range(num_blocks)), "each block once, in order"
        for i, w in enumerate(plan):
            later = {block for other in plan[i + 1 :] for block in range(other.start, other.stop)}
            assert not later & set(range(w.start, w.finished)), "a finished block is in no later window"
            assert set(range(w.finished, w.stop)) <= later, "one that is not finished is"
            assert w.start < w.finished <= w.stop


def test_whose_rounding_is_learned():
    """Eq. 10: the sum over a window's last `overlap` blocks; by default over all of them."""
    for num_blocks, window, overlap in PLANS:
        for w in SlidingWindows(window, overlap).plan(num_blocks):
            assert w.rounding_start == w.start
        for w in SlidingWindows(window, overlap, "overlap").plan(num_blocks) if overlap else ():
            learned = [block for block in range(w.start, w.stop) if block >= w.rounding_start]
            assert learned == list(range(w.start, w.stop))[len(w) - min(overlap, len(w)) :]


@pytest.mark.parametrize(
    ("window", "overlap", "num_blocks", "expected"),
    [
        (1, 0, 3, [(0, 1, 1), (1, 2, 2), (2, 3, 3)]),
        (2, 1, 4, [(0, 2, 1), (1, 3, 2), (2, 4, 4)]),
        (4, 3, 5, [(0, 4, 1), (1, 5, 5)]),
        (3, 1, 6, [(0, 3, 2), (2, 5, 4), (4, 6, 6)]),
        (3, 0, 3, [(0, 3, 3)]),
        (3, 0, 4, [(0, 3, 3), (3, 4, 4)]),
    ],
)
def test_plans_by_hand(window, overlap, num_blocks, expected):
    plan = SlidingWindows(window, overlap).plan(num_blocks)
    assert [(w.start, w.stop, w.finished) for w in plan] == expected


@pytest.mark.parametrize(("window", "overlap"), [(1, 0), (2, 1), (3, 1)])
def test_default_overlap(window, overlap):
    assert SlidingWindows(window).plan(12) == SlidingWindows(window, overlap).plan(12)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        *[({"window": value}, "cbd.window") for value in (0, -1, True, 2.0, "2", None)],
        *[({"window": 2, "overlap": value}, "cbd.overlap") for value in (-1, 2, 3, True, 1.0, "1")],
        *[({"window": 2, "rounding_blocks": value}, "cbd.rounding_blocks") for value in ("", "both", None)],
    ],
    ids=repr,
)
def test_values_out_of_range(options, key):
    with pytest.raises(InputError, match=key):
        SlidingWindows(**options)


def test_window_larger_than_the_model():
    with pytest.raises(InputError, match=r"cbd\.window must be at most the model's 3 blocks, got 4"):
        SlidingWindows(4).plan(3)


@pytest.mark.parametrize("window", [1, 2])
def test_rounding_of_the_overlap_needs_an_overlap(window: int) -> None:
    with pytest.raises(InputError, match=r"cbd\.rounding_blocks=overlap needs cbd\.overlap of at least 1"):
        SlidingWindows(window, 0, "overlap")
