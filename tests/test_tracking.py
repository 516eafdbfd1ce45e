import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wandb_file import read_wandb_run

from cbq.errors import InputError
from cbq.tracking import Tracker

ROWS = [
    {"cbq_step": 0, "window": 0, "loss/rec": 0.1 + 0.2, "loss/total": 1e-300},
    {"cbq_step": 1, "window": 0, "loss/rec": 1 / 3, "loss/total": 2.0, "beta": 20.0},
    {"cbq_step": 2, "window": 1, "loss/rec": 0.25, "lr/act_scale": 1e-4},
]


def read_csv(folder: Path) -> list[dict[str, float]]:
    """Read the rows of metrics.csv without their empty cells."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{key: float(cell) for key, cell in row.items() if cell != ""} for row in csv.DictReader(file)]


def record(tracker: Tracker, folder: Path, rows: list[dict[str, float]]) -> None:
    tracker.start(folder, name="w2a16", config={"quant": {"weight_bits": 2}}, tags=["pico", "x" * 70])
    for row in rows:
        tracker.log([row])


def test_the_wandb_run_holds_the_rows_of_the_csv(tmp_path):
    tracker = Tracker(mode="offline", project="cbq-tests", group="table1")
    record(tracker, tmp_path, ROWS)
    tracker.finish({"perplexity/embedded/quantized": 12.5, "perplexity/embedded/rtn": 99.0})

    run = read_wandb_run(tmp_path)
    assert read_csv(tmp_path) == ROWS
    assert run.rows == ROWS
    assert run.x_axes["*"] == "cbq_step"
    assert "cbq_step" in run.x_axes
    assert run.summary["perplexity/embedded/quantized"] == 12.5
    assert run.summary["perplexity/embedded/rtn"] == 99.0
    assert (run.name, run.project, run.group) == ("w2a16", "cbq-tests", "table1")
    assert run.tags == ["pico", "x" * 64]
    assert run.config["quant"] == {"weight_bits": 2}
    assert run.exit_code == 0


def test_runs_of_one_process_are_separate(tmp_path):
    tracker = Tracker()
    record(tracker, tmp_path / "first", ROWS[:2])
    tracker.failed()
    record(tracker, tmp_path / "second", ROWS[:1])  # begins at step 0 again
    # A second job may also begin with its own tracker while the first one was never closed.
    other = Tracker()
    record(other, tmp_path / "third", ROWS[2:])
    other.finish({"x": 3.0})
    tracker.finish({"x": 2.0})

    runs = {name: read_wandb_run(tmp_path / name) for name in ("first", "second", "third")}
    assert [runs[name].rows for name in runs] == [ROWS[:2], ROWS[:1], ROWS[2:]]
    assert [runs[name].exit_code for name in runs] == [1, 0, 0]
    assert (runs["second"].summary["x"], runs["third"].summary["x"]) == (2.0, 3.0)
    assert read_csv(tmp_path / "first") == ROWS[:2]


def test_many_rows_survive_the_blocks_of_the_wandb_file(tmp_path):
    rows = [{"cbq_step": step, "loss/rec": 1 / (step + 1)} for step in range(500)]
    tracker = Tracker()
    tracker.start(tmp_path, name="long", config={}, tags=[])
    tracker.log(rows)
    tracker.finish({})
    run = read_wandb_run(tmp_path)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert path.stat().st_size > 32 * 1024, "no record crosses a block"
    assert run.rows == rows == read_csv(tmp_path)


def test_csv_is_complete_while_the_run_goes_on(tmp_path):
    tracker = Tracker(mode="disabled")
    tracker.start(tmp_path, name="a", config={}, tags=[])
    for count, row in enumerate(ROWS, start=1):
        tracker.log([row])
        assert read_csv(tmp_path) == ROWS[:count]
    header, first, *_ = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "cbq_step,window,loss/rec,loss/total,beta,lr/act_scale"
    assert first == "0,0,0.30000000000000004,1e-300,,"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]  # no leftovers, no wandb folder
    tracker.finish({})


def test_rows_may_hold_tensors_and_numbers_that_are_not_finite(tmp_path):
    tracker = Tracker(mode="disabled")
    tracker.start(tmp_path, name="a", config={}, tags=[])
    tracker.log([{"cbq_step": 0, "loss/rec": torch.tensor(0.5), "loss/com": float("nan"), "beta": float("inf")}])
    tracker.finish({})
    assert (tmp_path / "metrics.csv").read_text() == "cbq_step,loss/rec,loss/com,beta\n0,0.5,nan,inf\n"


def test_the_step_must_grow(tmp_path):
    tracker = Tracker(mode="disabled")
    tracker.start(tmp_path, name="a", config={}, tags=[])
    tracker.log([{"cbq_step": 3}])
    for step in (3, 2):
        with pytest.raises(AssertionError, match="must grow"):
            tracker.log([{"cbq_step": step}])
    tracker.finish({})
    tracker.failed()  # closed already: nothing to do


@pytest.mark.parametrize("mode", ["Offline", "", "dryrun"])
def test_wrong_mode(mode):
    with pytest.raises(InputError, match=r"tracking.mode must be one of offline, online, disabled, not '"):
        Tracker(mode=mode)


def test_a_run_that_wandb_refuses_leaves_no_table(tmp_path):
    with pytest.raises(InputError, match=r"W&B refuses the run: .*a/b") as caught:
        Tracker(project="a/b").start(tmp_path, name="a", config={}, tags=[])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.csv").exists()


SCRIPT = """
import sys
from pathlib import Path
from cbq.tracking import Tracker
tracker = Tracker(mode=sys.argv[1])
tracker.start(Path(sys.argv[2]), name="a", config={}, tags=[])
tracker.log([{"cbq_step": 0}])
tracker.finish({})
print("wandb" in sys.modules)
"""


def test_no_import_when_disabled_and_no_network_when_offline(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # every request to the outside has to come by here
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy", "ALL_PROXY")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        environment |= dict.fromkeys(names, address)
        for mode, imported in (("disabled", "False"), ("offline", "True")):
            command = [sys.executable, "-c", SCRIPT, mode, str(tmp_path / mode)]
            process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            assert process.stdout.strip() == imported
            assert process.stderr == ""  # silent
        # A process that has ended leaves a whole file.
        assert read_wandb_run(tmp_path / "offline", patience_seconds=0.0).rows == [{"cbq_step": 0}]
        proxy.settimeout(0.2)
        with pytest.raises(TimeoutError):
            proxy.accept()
