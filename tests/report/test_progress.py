import io
import re
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils.data import DataLoader, TensorDataset

from cbq.reconstruction.result import WindowResult
from cbq.report import progress as progress_module
from cbq.report.progress import WindowProgress

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"
BATCHES, EPOCHS = 10, 2
STEPS = BATCHES * EPOCHS


class Clock:
    """A clock that only a training step moves."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


class Module(L.LightningModule):
    """A tiny fit whose shown loss is 1 - step / 100, and whose step takes a known time."""

    def __init__(self, start: int, stop: int, clock: Clock, step_seconds: float, error: BaseException | None) -> None:
        super().__init__()
        self.window = SimpleNamespace(start=start, stop=stop)
        self.linear = torch.nn.Linear(4, 4)
        self.losses: dict[str, torch.Tensor] = {}
        self.loss_at_start, self.loss_nearest = 3.0, 2.5
        self.clock, self.step_seconds, self.error = clock, step_seconds, error

    def training_step(self, batch, batch_idx):
        if self.error is not None:
            raise self.error
        loss = self.linear(batch[0]).square().mean()
        self.losses = {"loss/rec": torch.tensor(1 - self.global_step / 100), "loss/total": loss.detach()}
        self.clock.seconds += self.step_seconds
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(progress: WindowProgress, module: Module, max_steps: int = -1, accumulate: int = 1) -> None:
    trainer = L.Trainer(
        accumulate_grad_batches=accumulate,
        max_epochs=EPOCHS,
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=[progress],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.ones(BATCHES, 4))))


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def make_console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def solved(start: int, stop: int, seconds: float) -> WindowResult:
    return WindowResult(start, stop, 3.0, 1.25, 2.5, 0.1, seconds)


def run(console: Console, clock: Clock, step_seconds: float = 1.0, error: BaseException | None = None) -> str:
    """Show three windows, of which the last one may fail, and return all that was written."""
    with WindowProgress(console) as progress:
        progress.start(num_windows=3, steps_per_window=[STEPS] * 3)
        for start, stop in ((0, 2), (1, 3), (3, 4)):
            began = clock.seconds
            fit(progress, Module(start, stop, clock, step_seconds, error if start == 3 else None))
            clock.seconds += 1.0  # measuring the window
            progress.finish_window(solved(start, stop, clock.seconds - began))
    return console.file.getvalue()


def test_plain_lines(clock):
    assert run(make_console(terminal=False), clock).splitlines() == [
        "window 1/3  blocks 0-1  loss 2.5 (nearest), 3 (start) -> 1.25  21.0 s  left 0:42",
        "window 2/3  blocks 1-2  loss 2.5 (nearest), 3 (start) -> 1.25  21.0 s  left 0:21",
        "window 3/3  block 3  loss 2.5 (nearest), 3 (start) -> 1.25  21.0 s  left 0:00",
    ]


def test_plain_lines_inside_long_windows(clock):
    lines = run(make_console(terminal=False), clock, step_seconds=2.0).splitlines()
    assert len(lines) == 6
    # The latest tenth: steps 13 and 14.
    assert lines[0] == (
        "window 1/3  blocks 0-1  epoch 2/2  step 15/20  loss 0.865 (start 3, nearest 2.5)  30.0 s  left 1:30"
    )
    assert lines[1] == "window 1/3  blocks 0-1  loss 2.5 (nearest), 3 (start) -> 1.25  41.0 s  left 1:22"


def test_accumulated_batches_count_once(clock):
    console = make_console(terminal=False)
    with WindowProgress(console) as progress:
        progress.start(num_windows=1, steps_per_window=[STEPS // 5])
        fit(progress, Module(0, 1, clock, 3.0, None), accumulate=5)
    # Two steps an epoch, each of 5 batches of 3 seconds.
    assert [line.split("  loss")[0] for line in console.file.getvalue().splitlines()] == [
        "window 1/1  block 0  epoch 1/2  step 2/4",
        "window 1/1  block 0  epoch 2/2  step 4/4",
    ]


def test_one_bar_on_a_terminal(clock):
    output = run(make_console(terminal=True), clock)
    assert output.count(HIDE_CURSOR) == 1, "one display over all fits"
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)
    # What is left on the screen: a bar is drawn over its predecessor on the same line.
    screen = [ANSI.sub("", line.split(ERASE_LINE)[-1]).strip() for line in output.split("\n")]
    *lines, bar = (line for line in screen if "window" in line)
    assert [line.split("  loss")[0] for line in lines] == [
        "window 1/3  blocks 0-1",
        "window 2/3  blocks 1-2",
        "window 3/3  block 3",
    ]
    assert re.fullmatch(r"window 3/3  block 3 +━{16} +100% +left 0:00", bar)


@pytest.mark.parametrize(
    ("width", "held_against"), [(140, "epoch 2/2  loss 0.815 (start 3, nearest 2.5)"), (80, "loss 0.815")]
)
def test_a_wide_bar_shows_epochs_and_what_the_loss_is_held_against(clock, monkeypatch, width, held_against):
    shown: list[str] = []
    update = Progress.update
    monkeypatch.setattr(
        Progress, "update", lambda *args, **fields: shown.append(fields["status"]) or update(*args, **fields)
    )
    run(Console(file=io.StringIO(), force_terminal=True, width=width), clock)
    assert shown[STEPS - 1] == f"{held_against}  left 0:40"


def test_verbose_prints_every_epoch(clock):
    console = make_console(terminal=False)
    with WindowProgress(console, every_epoch=True) as progress:
        progress.start(num_windows=1, steps_per_window=[STEPS])
        fit(progress, Module(0, 2, clock, 1.0, None))
    assert [line.split("  loss")[0] for line in console.file.getvalue().splitlines()] == [
        "window 1/1  blocks 0-1  epoch 1/2  step 10/20",
        "window 1/1  blocks 0-1  epoch 2/2  step 20/20",
    ]


def test_the_bar_fits_80_columns(clock):
    console = make_console(terminal=True)
    module = Module(126, 128, clock, 0.0, None)
    with WindowProgress(console) as progress:
        progress.start(num_windows=10, steps_per_window=[STEPS] * 10)
        for _ in range(10):
            clock.seconds += 4000.0
            fit(progress, module)
            module.losses = {"loss/rec": torch.tensor(1.2345e-05)}
            progress.finish_window(solved(126, 128, 4000.0))
    assert "…" not in console.file.getvalue()
    assert "window 10/10  blocks 126-127" in ANSI.sub("", console.file.getvalue())


def test_losses_are_read_twice_a_second_at_most(clock, monkeypatch):
    reads = []
    original = progress_module._format_mean
    monkeypatch.setattr(progress_module, "_format_mean", lambda losses: reads.append(clock.seconds) or original(losses))
    run(make_console(terminal=True), clock, step_seconds=0.125)
    # 20 steps take 2.5 s: steps 1, 5, 9, 13 and 17.
    assert len(reads) == 3 * 5


def test_a_window_that_stops_early_is_complete(clock):
    console = make_console(terminal=False)
    with WindowProgress(console) as progress:
        progress.start(num_windows=2, steps_per_window=[STEPS, STEPS])
        fit(progress, Module(0, 1, clock, 1.0, None), max_steps=5)
        progress.finish_window(solved(0, 1, 5.0))
    assert console.file.getvalue() == "window 1/2  block 0  loss 2.5 (nearest), 3 (start) -> 1.25  5.0 s  left 0:05\n"


def test_a_window_where_nothing_is_learned_counts(clock):
    console = make_console(terminal=False)
    with WindowProgress(console) as progress:
        progress.start(num_windows=2, steps_per_window=[0, 0])
        for block in range(2):
            progress.finish_window(solved(block, block + 1, 1.0))
    assert [line.split("  loss")[0] for line in console.file.getvalue().splitlines()] == [
        "window 1/2  block 0",
        "window 2/2  block 1",
    ]


@pytest.mark.parametrize(
    ("error", "raised"), [(ArithmeticError("broken"), ArithmeticError), (KeyboardInterrupt(), SystemExit)]
)
def test_the_terminal_comes_back_after(clock, error, raised):
    interrupt_handler = signal.getsignal(signal.SIGINT)
    console = make_console(terminal=True)
    try:
        with pytest.raises(raised):
            run(console, clock, error=error)
    finally:
        signal.signal(signal.SIGINT, interrupt_handler)  # Lightning switches it off after Ctrl-C
    output = console.file.getvalue()
    assert output.rindex(SHOW_CURSOR) > output.rindex(HIDE_CURSOR)


def test_every_fit_must_be_announced(clock):
    progress = WindowProgress(Console(file=io.StringIO()))
    progress.stop()  # never started: harmless
    with pytest.raises(AssertionError, match="announce"):
        fit(progress, Module(0, 1, clock, 1.0, None))
    with pytest.raises(AssertionError, match="2 step counts for 3 windows"):
        progress.start(num_windows=3, steps_per_window=[1, 1])
