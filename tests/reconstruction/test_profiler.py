"""The trace of a real fit."""

import json
from pathlib import Path

import pytest

from cbq.errors import InputError
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.profiler import StepProfiler
from cbq.reconstruction.windows import SlidingWindows

W4A4 = QuantScheme(4, 4)


def names(folder: Path) -> list[str]:
    """Return the name of every event of the trace."""
    return [event.get("name", "") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]]


@pytest.mark.parametrize(
    ("skip", "batches", "traced"),
    [
        pytest.param(3, 2, 2, id=""),
        pytest.param(0, 1, 1, id="first", marks=pytest.mark.slow),
        pytest.param(7, 3, 3, id="late", marks=pytest.mark.slow),
        pytest.param(100, 100, 4, id="all"),
    ],
)
def test_as_many_steps_of_the_first_window_as_asked_for(run, tmp_path, skip, batches, traced):
    """4 steps an epoch; what is more than that is left out. Nothing of the second window."""
    run(W4A4, windows=SlidingWindows(1), callbacks=[StepProfiler(tmp_path, skip, batches)], num_windows=2)
    assert sum(name == "Optimizer.step#Adam.step" for name in names(tmp_path)) == traced
    table = (tmp_path / "profile.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.txt", "trace.json"]


def test_a_trace_changes_nothing(run, tmp_path):
    plain = run(W4A4, num_windows=1).state()
    traced = run(W4A4, num_windows=1, callbacks=[StepProfiler(tmp_path)]).state()
    assert all((plain[name] == traced[name]).all() for name in plain)


def test_batches_of_one_step_are_counted_singly(run, tmp_path):
    """Also where an epoch is less than a step."""
    options = {"batch_size": 2, "accumulate_grad_batches": 9, "epochs": 1, "num_windows": 1}
    run(W4A4, SlidingWindows(1), [StepProfiler(tmp_path, skip=5, batches=3)], **options)
    assert sum(name == "Optimizer.step#Adam.step" for name in names(tmp_path)) == 1


def test_a_failing_step_ends_the_profiler(run, tmp_path):
    class Fail(StepProfiler):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
            super().on_train_batch_end(trainer, module, outputs, batch, batch_index)
            if batch_index == 1:
                raise ArithmeticError("broken")

    profiler = Fail(tmp_path, skip=0, batches=8)
    with pytest.raises(ArithmeticError):
        run(W4A4, callbacks=[profiler], num_windows=1)
    assert profiler.profile is None
    run(W4A4, callbacks=[StepProfiler(tmp_path, skip=0, batches=1)], num_windows=1)


@pytest.mark.parametrize("options", [{"skip": -1}, {"skip": 1.5}, {"batches": 0}, {"batches": True}], ids=repr)
def test_mistakes(tmp_path, options):
    with pytest.raises(InputError, match=rf"^debug\.profile\.{next(iter(options))} must be an integer"):
        StepProfiler(tmp_path, **options)
