import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from wandb_file import read_wandb_run

from cbq.errors import InputError
from cbq.tracking import Tracker
from cbq.tracking.sink import RunInfo
from cbq.tracking.wandb_run import ID_NAME, WandbRun

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


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    """Killed while a line was written, with all of W&B's rows still in its buffer: as if nothing had happened."""
    rows = [{"cbq_step": step, "window": step // 2, "loss/rec": 1 / (step + 1), "lr/x": 1e-4} for step in range(8)]
    rows[2]["beta"], rows[7]["gamma"] = 20.0, float("inf")
    blocks = [{"block": block, "cbq_step": 2 * block + 1, "error/fc": block / 3} for block in range(4)]
    straight = Tracker()
    straight.start(tmp_path / "straight", name="a", config={}, tags=[])
    straight.log(rows)
    straight.log_blocks(blocks)
    straight.finish({"x": 2.0})

    folder = tmp_path / "interrupted"
    first = Tracker()
    first.start(folder, name="a", config={}, tags=[])
    first.log(rows[:6])  # the last window's are dropped: it was not finished
    first.log_blocks(blocks[:3])
    first.failed()
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    read_wandb_run(folder)  # waits for its end
    with (folder / "metrics.csv").open("a") as file:
        file.write("6,3,0.1")
    path.write_bytes(path.read_bytes()[:7])

    second = Tracker()
    second.start(folder, name="a", config={}, tags=[], first_step=4)
    assert read_csv(folder) == rows[:4]
    second.log(rows[4:])
    second.log_blocks(blocks[2:])
    second.finish({"x": 2.0})
    for name in ("metrics.csv", "blocks.csv"):
        assert (folder / name).read_text() == (tmp_path / "straight" / name).read_text()
    run = read_wandb_run(folder)
    assert [row for row in run.rows if "block" not in row] == rows
    assert [row for row in run.rows if "block" in row] == blocks
    assert run.id == path.stem.removeprefix("run-"), "the same W&B run"
    assert run.summary["x"] == 2.0


def test_a_run_that_was_sent_already_is_sent_as_another_when_it_goes_on(tmp_path):
    tracker = Tracker()
    record(tracker, tmp_path, ROWS[:2])
    tracker.failed()
    sent = read_wandb_run(tmp_path)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    path.with_name(f"{path.name}.synced").touch()  # as `wandb sync` does
    tracker.start(tmp_path, name="w2a16", config={}, tags=[], first_step=2)
    tracker.log(ROWS[2:])
    tracker.finish({})
    shutil.rmtree(path.parent)
    run = read_wandb_run(tmp_path)
    assert run.id != sent.id
    assert run.rows == ROWS


def test_rows_of_blocks_are_on_their_own_axis(tmp_path):
    tracker = Tracker()
    record(tracker, tmp_path, ROWS[:2])
    tracker.log_blocks([{"block": 0, "cbq_step": 1, "error/self_attn.q_proj": torch.tensor(0.25)}])
    tracker.log_blocks([{"block": 1, "cbq_step": 1, "error/self_attn.q_proj": 0.5, "error/mlp.fc": 1.0}])
    tracker.table("windows", [{"window": 0, "guard": "fell back"}, {"window": 1, "loss": 0.5}])
    tracker.finish({})
    assert (tmp_path / "blocks.csv").read_text().splitlines() == [
        "block,cbq_step,error/self_attn.q_proj,error/mlp.fc",
        "0,1,0.25,",
        "1,1,0.5,1.0",
    ]
    run = read_wandb_run(tmp_path)
    assert {name: run.x_axes[name] for name in ("*", "error/self_attn.q_proj", "error/mlp.fc")} == {
        "*": "cbq_step",
        "error/self_attn.q_proj": "block",
        "error/mlp.fc": "block",
    }
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/windows_*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["window", "guard", "loss"],
        "data": [[0, "fell back", None], [1, None, 0.5]],
    }


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read what TensorBoard shows of a run: by tag, steps and values in single precision."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(found.step, found.value) for found in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_rows(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = Tracker(mode="disabled", tensorboard=True)
    tracker.check()
    tracker.start(tmp_path, name="a", config={"quant.weight_bits": 2}, tags=[])
    tracker.log(ROWS[:2])
    tracker.log_blocks([{"block": 5, "cbq_step": 1, "error/fc": 0.5}])
    tracker.log(ROWS[2:])
    tracker.failed()
    tracker.start(tmp_path, name="a", config={}, tags=[], first_step=2)
    tracker.log([{"cbq_step": 2, "loss/rec": 0.125}])
    tracker.finish({"perplexity": 12.5})
    shown = read_events(tmp_path)
    assert shown["loss/rec"] == [(0, pytest.approx(0.3)), (1, pytest.approx(1 / 3)), (2, 0.125)]
    assert shown["error/fc"] == [(5, 0.5)]
    assert shown["beta"] == [(1, 20.0)]
    assert shown["summary/perplexity"] == [(2, 12.5)]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"tracking.tensorboard=true needs an extra: pip install 'cbq\[tensorboard\]'"):
        Tracker(mode="disabled", tensorboard=True).check()


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_wrong_flag_of_tensorboard(value):
    with pytest.raises(InputError, match=r"tracking\.tensorboard must be true or false"):
        Tracker(tensorboard=value)


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
for mode in ("disabled", "offline"):
    tracker = Tracker(mode=mode)
    tracker.start(Path(sys.argv[1]) / mode, name="a", config={}, tags=[])
    tracker.log([{"cbq_step": 0}])
    tracker.finish({})
    print(mode, "wandb" in sys.modules)
"""


def test_no_import_when_disabled_and_no_network_when_offline(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # every request to the outside has to come by here
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        names = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy", "ALL_PROXY")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        environment |= dict.fromkeys(names, address)
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert process.stdout.splitlines() == ["disabled False", "offline True"]
        assert process.stderr == ""  # silent
        # A process that has ended leaves a whole file.
        assert read_wandb_run(tmp_path / "offline", patience_seconds=0.0).rows == [{"cbq_step": 0}]
        proxy.settimeout(0.2)
        with pytest.raises(TimeoutError):
            proxy.accept()


@pytest.mark.parametrize("name", ["a/../../../victim", "..", "a b", "é"])
def test_an_id_that_is_a_path_removes_nothing(tmp_path, name):
    """The folder may come from somebody else."""
    run = tmp_path / "run"
    (run / "wandb" / "offline-run-1-a").mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("mine")
    (run / "wandb" / ID_NAME).write_text(name)
    info = RunInfo(run, "name", {}, [], 3, {})
    assert WandbRun("offline", "cbq", None, None)._earlier_id(info) is None
    assert (tmp_path / "victim" / "file").exists()
