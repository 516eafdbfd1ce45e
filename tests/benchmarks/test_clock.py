"""Interleaving."""

import gc

import pytest
import torch

from benchmarks.clock import interleave, now, ratios


def test_order_and_warm_up():
    calls = []
    samples = interleave([lambda: calls.append("a") or "a", lambda: calls.append("b") or "b"], repeats=2)
    assert calls == ["a", "b"] * 3  # the first of each is not counted
    assert samples == [["a", "a"], ["b", "b"]]


def test_no_garbage_collection_inside_and_as_it_was_after():
    assert interleave([gc.isenabled], repeats=1) == [[False]]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        interleave([lambda: 1 / 0], repeats=1)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_ratios_are_those_of_each_repeat():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == (2.0, 3.0)


def test_now_grows():
    device = torch.device("cpu")
    assert now(device) <= now(device)
