"""A whole run of the default options on pico: the share of each phase, and what it costs above its steps alone.

The run is `Runner.run` on the composed configuration, as `python run.py` does it; importing Python modules is left out.
A phase's time is its own: a target computed inside a window counts as a target. The functions of a phase are named in
`PHASES`; one that is renamed fails here, and the test of the quick run says so.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from unittest import mock

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import cbq.reconstruction.loop
import cbq.runner
from benchmarks.clock import interleave
from benchmarks.memory import Work
from benchmarks.plan import Plan
from benchmarks.rows import Row
from benchmarks.shapes import SIZES
from benchmarks.steps import WindowSteps
from cbq.activations import ActivationCache
from cbq.cli import conf_dir, flatten
from cbq.reconstruction.solver import Reconstruction
from cbq.reconstruction.window_solver import WindowSolver
from cbq.run_folder import RunFolder
from cbq.runner import Runner
from cbq.tracking import Tracker

# Where a function is looked up, and its name there.
PHASES: dict[str, list[tuple[object, str]]] = {
    "loading": [(Runner, "prepare")],
    "evaluation": [(Runner, "score")],
    "sample texts": [(cbq.runner, "generate_text")],
    "activation streams": [(ActivationCache, "__init__"), (ActivationCache, "advance_quantized")],
    "targets": [(ActivationCache, "advance_full_precision")],
    "window steps": [(Reconstruction, "_fit")],
    "measuring": [(WindowSolver, "measure")],
    "fusing": [(cbq.reconstruction.loop, "fuse_linears_")],
    "collecting garbage": [(gc, "collect")],
    "saving": [(cbq.runner, "save_checkpoint")],
    "tracking": [(Tracker, "start"), (Tracker, "log"), (Tracker, "finish")],
}
COMPOSING, OTHER = "composing options", "other"
QUICK = [
    "calibration.num_segments=2",
    "calibration.segment_tokens=16",
    "reconstruction.epochs=1",
    "evaluation=none",
    "tracking.mode=disabled",
    "report=none",
    "quant=w4a16",
    "rounding=nearest",
    "cbd.window=4",
    "cbd.overlap=0",
]


def measure(plan: Plan) -> Iterator[Row]:
    """Yield a row a phase, and the run against its steps in a plain loop."""
    seconds, num_steps = run_pico(QUICK if plan.quick else [])
    total = sum(seconds.values())
    for phase, share in seconds.items():
        yield Row("run", f"share of {phase}", "pico", (share / total,), "share", judged=False)
    size = SIZES["tiny" if plan.quick else "pico"]
    steps = WindowSteps(Work(size, "w2a16", "lora", size.steps, size.on(plan.device)), plan.device)
    (plain,) = interleave([steps.plain_loop], plan.repeats)
    note = f"{total:.0f} s, {num_steps} steps"
    values = tuple(total / (num_steps * seconds_a_step) for seconds_a_step in plain)
    yield Row("run", "whole run / its steps in a plain loop", "pico", values, expected=1.3, note=note)


def run_pico(overrides: list[str]) -> tuple[dict[str, float], int]:
    """Return the seconds of each phase of a run, and how many optimizer steps it took."""
    with tempfile.TemporaryDirectory() as folder:
        stopwatch = SelfTimes(OTHER)
        with stopwatch.phase(COMPOSING), initialize_config_dir(conf_dir(), version_base="1.3"):
            config = compose("config", overrides=overrides)
            runner = instantiate(config.runner, folder=RunFolder(Path(folder), config), settings=flatten(config))
        runner.console.quiet = True
        with stopwatch.watching(PHASES):
            results = runner.run()
        num_steps = len(results["windows"]) * runner.solver.steps(config.calibration.num_segments)
    return stopwatch.stop(), num_steps


class SelfTimes:
    """Wall time by the innermost phase that runs.

    Args:
        outside: what time outside of every phase is called.
    """

    def __init__(self, outside: str) -> None:
        self.seconds = {outside: 0.0}
        self.running = [outside]
        self.since = time.perf_counter()

    def _settle(self) -> None:
        """Give the time since the last change to the phase that ran."""
        now = time.perf_counter()
        self.seconds[self.running[-1]] = self.seconds.get(self.running[-1], 0.0) + now - self.since
        self.since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the `with` to `name`, but for phases inside of it."""
        self._settle()
        self.running.append(name)
        try:
            yield
        finally:
            self._settle()
            self.running.pop()

    @contextmanager
    def watching(self, phases: dict[str, list[tuple[object, str]]]) -> Iterator[None]:
        """Count every call of the functions of `phases` as their phase."""
        with ExitStack() as stack:
            for name, functions in phases.items():
                for owner, attribute in functions:
                    counted = self._counted(name, getattr(owner, attribute))
                    stack.enter_context(mock.patch.object(owner, attribute, counted))
            yield

    def _counted(self, name: str, function: Callable) -> Callable:
        """Return `function` such that its calls count as the phase `name`."""

        @wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            with self.phase(name):
                return function(*args, **kwargs)

        return call

    def stop(self) -> dict[str, float]:
        """Return the seconds of every phase that ran."""
        self._settle()
        return self.seconds
