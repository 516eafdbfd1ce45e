"""One progress display over all windows of a run, which outlives the many `Trainer.fit` calls."""

import time
from collections import deque
from types import TracebackType
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from cbq.cost import format_duration
from cbq.reconstruction.result import WindowResult

READ_SECONDS = 0.5  # at most this often a loss is read: on a GPU, reading waits for the work in flight
LINE_SECONDS = 30.0  # a log of plain lines shows that a long window is alive
WIDE = 110  # columns from which on the bar's line has room for epochs and for what the loss is to be held against


class WindowProgress(L.Callback):
    """Shows window, blocks, loss and time left: one bar on a terminal, and a plain line for every finished window.

    While a window is learned, the loss shown is the mean of "loss/rec" over the latest tenth of its steps, because
    steps see different segments and single ones cannot be compared. A finished window shows its measured losses,
    rounded to nearest and as learned: those of soft rounding say nothing about what is left after hardening.

    Args:
        console: Where to draw. By default one of its own, which no other live display shares.
        every_epoch: Print a line at the end of every epoch too.

    Example:
        with WindowProgress() as progress:
            progress.start(num_windows=7, steps_per_window=[384] * 7)
            for window in windows:
                progress.finish_window(solver.solve(window, cache, callbacks=[progress]))
    """

    def __init__(self, console: Console | None = None, every_epoch: bool = False) -> None:
        self._console = console or Console()
        self._every_epoch = every_epoch
        self._bar: Progress | None = None
        self._steps_per_window: list[int] = []
        self._num_finished = self._num_before = 0  # windows
        self._step = 0  # of the current window
        self._latest_losses: deque[torch.Tensor] = deque()

    def __enter__(self) -> "WindowProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, num_windows: int, steps_per_window: list[int], num_finished: int = 0) -> None:
        """Open the display; the time left counts from here.

        Args:
            num_windows: How many `finish_window` will end.
            steps_per_window: Optimizer steps of each window, all epochs together; 0 where nothing is learned.
            num_finished: How many of them an earlier run ended.
        """
        assert len(steps_per_window) == num_windows, f"{len(steps_per_window)} step counts for {num_windows} windows"
        self.stop()
        self._steps_per_window = steps_per_window
        self._num_finished, self._step = num_finished, 0
        self._num_before = num_finished
        self._start_time = time.monotonic()
        if self._console.is_interactive:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=16),
                TaskProgressColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
            )
            title = f"window {num_finished}/{num_windows}"
            self._bar.add_task(title, completed=self._steps_done(), total=sum(steps_per_window), status="")
            self._bar.start()

    def stop(self) -> None:
        """Close the display and give the terminal back; harmless when it is closed."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to learn a window."""
        assert self._num_finished < len(self._steps_per_window), "start() must announce every window"
        self._tenth = max(1, self._steps_per_window[self._num_finished] // 10)
        self._step = 0
        self._latest_losses = deque(maxlen=self._tenth)
        self._window_time = self._line_time = time.monotonic()
        self._read_time = float("-inf")  # the first step shows at once

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count an optimizer step; show it if the last news is old enough."""
        if trainer.global_step == self._step:
            return  # gradients are still accumulated
        self._step = trainer.global_step
        self._latest_losses.append(pl_module.losses["loss/rec"])
        self._epoch = self._epoch_of(trainer)
        now = time.monotonic()
        if self._every_epoch and trainer.is_last_batch:
            self._print_step(pl_module)
        if self._bar is not None and now - self._read_time >= READ_SECONDS:
            self._read_time = now
            self._update_bar(pl_module)
        elif self._bar is None and now - self._line_time >= LINE_SECONDS:
            self._line_time = now
            self._print_step(pl_module)

    def finish_window(self, result: WindowResult) -> None:
        """End a window; one that stopped early counts as complete."""
        position = self._position(result.start, result.stop)
        self._num_finished, self._step = self._num_finished + 1, 0
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._steps_done(), status=f"left {self._time_left()}")
        self._print(
            position,
            f"loss {result.rec_loss_rtn:.4g} (nearest), {result.rec_loss_first:.4g} (start)"
            f" -> {result.rec_loss_last:.4g}",
            f"{result.wall_time_seconds:.1f} s",
            f"left {self._time_left()}",
        )
        if result.guard:
            self._print(f"guard: {result.guard}")

    def _update_bar(self, module: L.LightningModule) -> None:
        task = self._bar.task_ids[0]
        status = f"loss {_format_mean(self._latest_losses)}  left {self._time_left()}"
        if self._console.width >= WIDE:
            status = "  ".join([self._epoch, self._loss(module), f"left {self._time_left()}"])
        position = self._position(module.window.start, module.window.stop)
        self._bar.update(task, description=position, completed=self._steps_done(), status=status)

    def _print_step(self, module: L.LightningModule) -> None:
        self._print(
            self._position(module.window.start, module.window.stop),
            self._epoch,
            f"step {self._step}/{self._steps_per_window[self._num_finished]}",
            self._loss(module),
            f"{time.monotonic() - self._window_time:.1f} s",
            f"left {self._time_left()}",
        )

    def _loss(self, module: L.LightningModule) -> str:
        """Return the loss of the latest steps, and what it is to be held against."""
        start, nearest = module.loss_at_start, module.loss_nearest
        held_against = "" if start is None else f" (start {start:.4g}, nearest {nearest:.4g})"
        return f"loss {_format_mean(self._latest_losses)}{held_against}"

    def _epoch_of(self, trainer: L.Trainer) -> str:
        """Return which epoch it is, and of how many."""
        steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        total = -(-self._steps_per_window[self._num_finished] // steps)
        return f"epoch {trainer.current_epoch + 1}/{total}"

    def _print(self, *parts: str) -> None:
        self._console.print("  ".join(parts), markup=False, highlight=False, soft_wrap=True)

    def _position(self, start: int, stop: int) -> str:
        blocks = f"blocks {start}-{stop - 1}" if stop - start > 1 else f"block {start}"
        return f"window {self._num_finished + 1}/{len(self._steps_per_window)}  {blocks}"

    def _steps_done(self) -> int:
        return sum(self._steps_per_window[: self._num_finished]) + self._step

    def _time_left(self) -> str:
        """Extend the pace so far, with the work between the windows, over the steps to come."""
        before = sum(self._steps_per_window[: self._num_before])
        done, total = self._steps_done() - before, sum(self._steps_per_window) - before
        if not total:
            done, total = self._num_finished - self._num_before, len(self._steps_per_window) - self._num_before
        if not done:
            return "-"
        return format_duration((time.monotonic() - self._start_time) * max(0, total - done) / done)


def _format_mean(losses: deque[torch.Tensor]) -> str:
    return f"{torch.stack(list(losses)).mean().item():.4g}" if losses else "-"
