"""What may be started in a folder that already holds something."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cbq.cli import conf_dir
from cbq.errors import InputError
from cbq.results import RESULTS_NAME, read_results
from cbq.run_folder import CONFIG_NAME, RunFolder, experiment, withdraw

CONFIG = {"quant": {"weight_bits": 4, "label": "W${.weight_bits}"}, "seed": 0, "overwrite": False, "tracking": {"x": 1}}


def make(path: Path, start_anew: bool = False, **changes: object) -> RunFolder:
    return RunFolder(path, OmegaConf.create(CONFIG | changes), start_anew)


def leave_run(path: Path, status: str, **changes: object) -> None:
    """Leave what a run leaves."""
    make(path, **changes).start({"status": status})
    (path / "metrics.csv").write_text("cbq_step\n")
    (path / "checkpoint" / "cbq").mkdir(parents=True)
    (path / "checkpoint" / "config.json").write_text("{}")


@pytest.mark.parametrize("exists", [False, True])
def test_new_folder(tmp_path, exists):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    folder = make(path)
    assert not folder.is_finished()
    folder.start({"status": "running"})
    assert sorted(file.name for file in path.iterdir()) == [CONFIG_NAME, RESULTS_NAME]
    assert read_results(path)["status"] == "running"
    assert OmegaConf.load(path / CONFIG_NAME) == OmegaConf.create(CONFIG)


def test_finished_run_of_the_same_configuration(tmp_path):
    leave_run(tmp_path, "finished")
    before = sorted(tmp_path.rglob("*"))
    assert make(tmp_path).is_finished()
    assert sorted(tmp_path.rglob("*")) == before, "asking changes nothing"


@pytest.mark.parametrize(
    "changes", [{"tracking": {"x": 2}}, {"overwrite": True}, {"quant": {"label": "W4", "weight_bits": 4}}], ids=repr
)
def test_what_does_not_make_another_experiment(tmp_path, changes):
    """Where curves go; the order of options; a value written out instead of computed."""
    leave_run(tmp_path, "finished")
    assert make(tmp_path, **changes).is_finished()


@pytest.mark.parametrize("status", ["finished", "running", "failed"])
@pytest.mark.parametrize("changes", [{"seed": 1}, {"quant": {"weight_bits": 2}}, {"new": 1}], ids=repr)
def test_another_configuration(tmp_path, status, changes):
    leave_run(tmp_path, status)
    with pytest.raises(InputError, match=r"different configuration.*overwrite=true"):
        make(tmp_path, **changes).is_finished()


@pytest.mark.parametrize("status", ["running", "failed"])
def test_unfinished_run_goes_on_from_its_state(tmp_path, status):
    """Curves, the log and the state stay; what is made at the end goes."""
    leave_run(tmp_path, status)
    for name in ("run.log", "error.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "state").mkdir()
    folder = make(tmp_path)
    assert not folder.is_finished()
    assert folder.goes_on
    with folder.held():
        folder.start({"status": "running"})
    kept = ["config.yaml", "metrics.csv", "results.json", "run.log", "state"]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept


def read_seed(path: Path) -> int:
    """Return the seed of the configuration in a folder."""
    return OmegaConf.load(path / CONFIG_NAME).seed


@pytest.mark.parametrize("moment", range(12))
def test_killed_while_it_starts(tmp_path, monkeypatch, moment):
    """Whenever that is, the same command works again, and what was finished before does not count as finished."""
    leave_run(tmp_path, "finished", seed=9)
    (tmp_path / "state").mkdir()
    calls = []

    def killed(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) > moment:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "replace"), (shutil, "rmtree"), (Path, "unlink")):
            patch.setattr(module, name, killed(getattr(module, name)))
        with suppress(KeyboardInterrupt):
            make(tmp_path, start_anew=True).start({"status": "running"})
    again = make(tmp_path, start_anew=True)
    assert not again.is_finished()
    if OmegaConf.load(tmp_path / CONFIG_NAME) == OmegaConf.create(CONFIG):
        assert not (tmp_path / "state").exists(), "of the old run"
    if moment:
        assert not make(tmp_path, seed=9 if read_seed(tmp_path) == 9 else 0).is_finished()
    again.start({"status": "running"})
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG_NAME, RESULTS_NAME]


def test_what_only_an_error_is_in_is_free(tmp_path):
    """A run that failed before it began, in a folder that was there."""
    (tmp_path / "error.txt").write_text("Traceback")
    (tmp_path / "slurm-1.out").write_text("mine")
    folder = make(tmp_path)
    assert not folder.is_finished()
    folder.start({"status": "running"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "results.json", "slurm-1.out"]


def test_killed_before_there_are_results(tmp_path):
    folder = make(tmp_path)
    folder.start({"status": "running"})
    (tmp_path / RESULTS_NAME).unlink()
    assert not folder.is_finished()
    with pytest.raises(InputError, match="holds no run of cbq"):
        make(tmp_path, seed=1).is_finished()


HOLDER = """
import sys, time
from pathlib import Path
from omegaconf import OmegaConf
from cbq.run_folder import RunFolder
with RunFolder(Path(sys.argv[1]), OmegaConf.create()).held():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time(tmp_path):
    """Two of one process or of two; a killed one holds nothing."""
    with make(tmp_path).held(), pytest.raises(InputError, match="in use by another run"), make(tmp_path).held():
        pass
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="in use by another run"), make(tmp_path).held():
            pass
        process.kill()
        process.wait()
    with make(tmp_path).held():
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_its_last_holder_removed_is_none(tmp_path, monkeypatch):
    """It ends between the opening and the locking of the file: a third run would find no file, and lock another."""
    real, calls = FileLock.acquire, []

    def late(self, **options):
        result = real(self, **options)
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return result

    monkeypatch.setattr(FileLock, "acquire", late)
    with make(tmp_path).held(), pytest.raises(InputError, match="in use by another run"), make(tmp_path).held():
        pass
    assert len(calls) == 2


def test_results_without_configuration(tmp_path):
    leave_run(tmp_path, "finished")
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(InputError, match="different configuration"):
        make(tmp_path).is_finished()


@pytest.mark.parametrize("text", ["not yaml: [", "just text", "- a list", "a: ${nowhere}"])
def test_damaged_configuration(tmp_path, text):
    leave_run(tmp_path, "finished")
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(InputError):
        make(tmp_path).is_finished()


def test_damaged_results(tmp_path):
    leave_run(tmp_path, "finished")
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json"):
        make(tmp_path).is_finished()
    assert not make(tmp_path, start_anew=True).is_finished()


@pytest.mark.parametrize("status", ["finished", "running", "failed"])
@pytest.mark.parametrize("changes", [{}, {"seed": 1}], ids=repr)
def test_overwrite_clears_known_outputs_only(tmp_path, status, changes):
    leave_run(tmp_path, status)
    for name in ("wandb", "state"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("old")
    own = {"notes.txt": "mine", "plots/loss.png": "mine", ".hydra/config.yaml": "hydra's"}
    for name, text in own.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = make(tmp_path, start_anew=True, **changes)
    assert not folder.is_finished()
    folder.start({"status": "running"})
    assert {name: (tmp_path / name).read_text() for name in own} == own
    kept = {"notes.txt", "plots", ".hydra", CONFIG_NAME, RESULTS_NAME}
    assert {file.name for file in tmp_path.iterdir()} == kept
    assert OmegaConf.load(tmp_path / CONFIG_NAME) == OmegaConf.create(CONFIG | changes)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["wandb/my-other-run", "checkpoint/mine.txt", "config.yaml", "metrics.csv"])
def test_a_folder_that_holds_no_run_keeps_what_is_in_it(tmp_path, name, overwrite):
    """Nothing of the user's is removed: `hydra.run.dir=.` in a project that has a `wandb/`."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="holds no run of cbq, but"):
        make(tmp_path, overwrite).is_finished()
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("value", ["no", "yes", 0, 1, None], ids=repr)
def test_overwrite_is_true_or_false(tmp_path, value):
    """The text `no` would count as true, and remove a run."""
    with pytest.raises(InputError, match="overwrite must be true or false"):
        make(tmp_path, value)


@pytest.mark.parametrize("below", ["", "below"])
def test_a_path_that_cannot_be_a_folder(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    folder = make(tmp_path / "file" / below)
    with pytest.raises(InputError, match="file"):
        folder.is_finished() or folder.start({"status": "running"})
    assert (tmp_path / "file").read_text() == "mine"


def test_tracking_is_not_the_experiment_in_the_real_configuration(tmp_path):
    """Other groups are repeated below `runner`: what does not count must not come back in there."""

    def composed(*overrides: str) -> RunFolder:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            return RunFolder(tmp_path, compose("config", overrides=list(overrides)))

    composed("tracking.mode=disabled", "report=none").start({"status": "finished"})
    assert composed("tracking.mode=offline", "overwrite=true").is_finished()
    with pytest.raises(InputError, match="different configuration"):
        composed("rounding.rank=4").is_finished()


def test_where_streams_are_kept_is_not_the_experiment(tmp_path):
    """It changes no bit of the result."""

    def composed(*overrides: str) -> RunFolder:
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            return RunFolder(tmp_path, compose("config", overrides=list(overrides)))

    composed("activations.cache=device").start({"status": "finished"})
    assert composed("activations.cache=disk").is_finished()


def test_linked_output(tmp_path):
    """An output that is a link to another disk: overwriting removes the link, not what it points to."""
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    leave_run(path, "finished")
    (path / "wandb").symlink_to(elsewhere, target_is_directory=True)
    make(path, start_anew=True).start({"status": "running"})
    assert (elsewhere / "file").read_text() == "mine"
    assert not (path / "wandb").exists()


def test_withdraw_removes_empty_folders_only(tmp_path):
    path = tmp_path / "kept" / "date" / "time"
    path.mkdir(parents=True)
    (tmp_path / "kept" / "file").write_text("mine")
    withdraw(path, {tmp_path})
    assert [file.name for file in tmp_path.rglob("*")] == ["kept", "file"]


@pytest.mark.parametrize("there", ["", "date", "date/time"])
def test_withdraw_keeps_empty_folders_that_were_there(tmp_path, there):
    path = tmp_path / "date" / "time"
    path.mkdir(parents=True)
    before = {
        tmp_path,
        *(folder for folder in (path.parent, path) if there.startswith(str(folder.relative_to(tmp_path)))),
    }
    withdraw(path, before)
    assert {tmp_path, *tmp_path.rglob("*")} == before


def test_withdraw_keeps_what_is_not_empty(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "file").write_text("mine")
    withdraw(path, ())
    assert (path / "file").read_text() == "mine"


def test_withdraw_of_a_folder_that_was_never_made(tmp_path):
    withdraw(tmp_path / "a" / "b", ())
    assert tmp_path.is_dir()


def test_baselines_are_not_part_of_the_experiment():
    """They say nothing about the quantized model: a finished cell is finished with and without them."""
    configs = [OmegaConf.create({"evaluation": {"corpora": ["c4"], "baselines": flag}}) for flag in (True, False)]
    configs.append(OmegaConf.create({"evaluation": {"corpora": ["c4"]}}))
    assert experiment(configs[0]) == experiment(configs[1]) == experiment(configs[2])
