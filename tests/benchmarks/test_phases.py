"""Times of nested phases."""

from types import SimpleNamespace

import pytest

from benchmarks.phases import SelfTimes


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.time = 100.0

    def perf_counter(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("benchmarks.phases.time", clock)
    return clock


def wait(clock: Clock, seconds: float) -> str:
    clock.time += seconds
    return "waited"


def test_a_phase_inside_another_counts_once(clock):
    times = SelfTimes("other")
    wait(clock, 1)
    with times.phase("outer"):
        wait(clock, 2)
        with times.phase("inner"):
            wait(clock, 4)
        wait(clock, 8)
    wait(clock, 16)
    assert times.stop() == {"other": 17.0, "outer": 10.0, "inner": 4.0}


def test_functions_are_watched_and_then_left_as_they_were(clock):
    module = SimpleNamespace(work=wait, fail=lambda clock: wait(clock, 3) and 1 / 0)
    before = dict(vars(module))
    times = SelfTimes("other")
    with times.watching({"working": [(module, "work")], "failing": [(module, "fail")]}):
        assert module.work(clock, 2) == "waited"
        with pytest.raises(ZeroDivisionError):
            module.fail(clock)
        module.work(clock, seconds=5)
    assert vars(module) == before
    assert times.stop() == {"other": 0.0, "working": 7.0, "failing": 3.0}


def test_a_function_that_is_gone_is_an_error():
    with pytest.raises(AttributeError), SelfTimes("other").watching({"working": [(SimpleNamespace(), "renamed")]}):
        pass
