"""A trace of a few optimizer steps: where a step's time goes."""

from pathlib import Path

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cbq.errors import InputError
from cbq.reconstruction.module import WindowModule

TRACE_NAME, TABLE_NAME = "trace.json", "profile.txt"
TABLE_ROWS = 40


class StepProfiler(L.Callback):
    """Traces some batches of the first window that is learned, and writes `trace.json` and `profile.txt`.

    The trace is for chrome://tracing or Perfetto; the table lists the most expensive operators, by their own time on
    the GPU where there is one and on the CPU otherwise. What the first epoch does not have is left out, from the
    skipped batches first.

    Args:
        folder: where to write.
        skip: batches before the trace: memory is allocated and kernels are chosen in the first ones.
        batches: batches in the trace.

    Raises:
        InputError: a number is no integer, or too small.
    """

    def __init__(self, folder: Path, skip: int = 5, batches: int = 3) -> None:
        for key, value, least in (("skip", skip, 0), ("batches", batches, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"debug.profile.{key} must be an integer of at least {least}, got {value!r}")
        self.folder = folder
        self.skip = skip
        self.batches = batches
        self.profile: profile | None = None
        self.done = False

    def on_train_start(self, trainer: L.Trainer, module: WindowModule) -> None:
        if self.done:
            return
        self.done = True
        batches = min(self.batches, trainer.num_training_batches)
        skip = min(self.skip, trainer.num_training_batches - batches)
        warmup = min(1, skip)  # the profiler's own start
        self.profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
            schedule=schedule(wait=skip - warmup, warmup=warmup, active=batches, repeat=1),
            on_trace_ready=self._write,
            record_shapes=True,
            acc_events=True,
        )
        self.profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: WindowModule, outputs: object, batch: object, batch_index: int
    ) -> None:
        if self.profile is not None:
            self.profile.step()

    def on_train_end(self, trainer: L.Trainer, module: WindowModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, module: WindowModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        """End the profiler, which slows down what it watches, and forget it."""
        if self.profile is not None:
            self.profile.stop()
            self.profile = None

    def _write(self, finished: profile) -> None:
        """Write what was traced."""
        finished.export_chrome_trace(str(self.folder / TRACE_NAME))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=key, row_limit=TABLE_ROWS)
        (self.folder / TABLE_NAME).write_text(table, encoding="utf-8")
