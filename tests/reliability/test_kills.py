"""A run is killed, or its disk fails, at any moment; it goes on, and ends as one that nothing happened to."""

import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from started_runs import Starter, assert_same, one_line

pytestmark = pytest.mark.slow
RUNS, KILLS_A_RUN = 10, 5
WRITES = 60  # of all calls that change the disk, as many are killed, from the first to the last


@pytest.mark.parametrize("index", range(RUNS))
def test_killed_at_random_moments(starter, reference, seconds, tmp_path, moments, index, record_property):
    """SIGKILL, again and again, each time after a random time; a run that ended before it makes room for another."""
    moments.seed(index)
    killed = ended_well = code = 0
    while killed < KILLS_A_RUN or code:
        kill = killed < KILLS_A_RUN
        run = tmp_path / f"run{ended_well}"
        ended = starter.start(run, after=moments.uniform(0, seconds) if kill else None)
        assert ended.code in (0, *([-signal.SIGKILL] if kill else [])), ended.said
        code = ended.code
        killed += code == -signal.SIGKILL
        if code == 0:
            assert_same(reference, run)
            ended_well += 1
    record_property("tried", killed)


def test_killed_at_writes(starter, reference, tmp_path, record_property):
    """SIGKILL before or after a call that changes the disk."""
    starter.start(tmp_path / "counted", die_at=0)
    (counted,) = starter.folder.glob("*.writes")
    writes = int(counted.read_text())
    counted.unlink()
    assert writes > 60
    numbers = sorted({1 + (writes - 1) * index // (WRITES - 1) for index in range(WRITES)})
    for number in numbers:
        run = tmp_path / f"run{number}"
        killed = starter.start(run, die_at=number)
        assert killed.code == -signal.SIGKILL, killed.said
        ended = starter.start(run)
        assert ended.code == 0, f"write {number} of {writes}: {ended.said}"
        assert_same(reference, run)
        shutil.rmtree(run)
    record_property("tried", len(numbers))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["sigint", "sigterm"])
def test_asked_to_end(starter, reference, seconds, tmp_path, moments, number, code, record_property):
    """Ctrl-C, or what a scheduler sends: the run says how to go on, and does."""
    tried = told = 0
    for index in range(10):
        run = tmp_path / f"run{index}"
        # As typed again by resume=, overwrite=true would throw away what there is to go on from.
        words = ("overwrite=true", "report=none")
        ended = starter.start(run, *words, after=moments.uniform(0.1, 0.9) * seconds, number=number)
        if ended.code == 0:
            continue
        tried += 1
        assert ended.code == code, ended.said
        assert "Traceback" not in ended.said, ended.said
        if f"cbq: to go on: cbq resume={run}" in ended.said:
            told += 1
            assert (run / "error.txt").is_file()
            windows = len(list((run / "state").glob("state.*.json"))) > 1
            ended = starter.start(run, resume=True)
            assert ("going on after window" in ended.said) or not windows, ended.said
        else:  # it had not begun
            ended = starter.start(run, "report=none")
        assert ended.code == 0, ended.said
        assert_same(reference, run)
    assert tried >= 5
    assert told >= 3
    record_property("tried", tried)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, whose size and mode can be changed; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system of one's own needs root")

    def change(*options: str) -> None:
        subprocess.run(["mount", "-o", ",".join(("remount", *options)), str(folder)], check=True)

    yield folder, change
    subprocess.run(["umount", "-l", folder], check=False)


@pytest.mark.parametrize("kib", [20, 200, 600, 1000, 1400, 1800, 2200, 2600, 3000, 4000])
def test_a_full_disk(starter, reference, disk, kib, record_property):
    """Wherever it fills up: a line, what was there stays, and with more room the run goes on."""
    folder, change = disk
    change(f"size={kib}k")
    ended = starter.start(folder / "run")
    full = ended.code != 0
    if full:
        assert ended.code == 2, ended.said
        assert "No space left on device" in one_line(ended)
    change("size=100m")
    ended = starter.start(folder / "run")
    assert ended.code == 0, ended.said
    assert_same(reference, folder / "run")
    record_property("tried", int(full))


def test_a_disk_that_cannot_be_written_to(starter, reference, disk, record_property):
    folder, change = disk
    change("size=100m", "ro")
    ended = starter.start(folder / "run")
    assert ended.code == 2, ended.said
    assert "Read-only file system" in one_line(ended)
    change("rw")
    assert starter.start(folder / "run").code == 0
    assert_same(reference, folder / "run")
    record_property("tried", 1)


def test_a_disk_that_can_no_longer_be_written_to(starter, reference, seconds, disk, record_property):
    folder, change = disk
    change("size=100m")
    run, tried = folder / "run", 0
    for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        timer = threading.Timer(share * seconds, freeze, [folder])
        timer.start()
        ended = starter.start(run, "report=none", "overwrite=true")
        timer.join()
        subprocess.run(["umount", folder], check=True)
        if ended.code == 0:  # it came too late
            continue
        tried += 1
        assert ended.code == 2, ended.said
        assert "Read-only file system" in one_line(ended)
        assert starter.start(run, "report=none").code == 0
        assert_same(reference, run)
    assert tried >= 3
    record_property("tried", tried)


def freeze(folder: Path) -> None:
    """Put a read-only view of a disk over it: who has a file open may go on writing to that, and to nothing else."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


@pytest.fixture(scope="module")
def half(starter, tmp_path_factory) -> Path:
    """A run that was killed with two windows behind it."""
    run = tmp_path_factory.mktemp("half") / "run"
    killed = starter.start(run, once=run / "state" / "state.3.json")
    assert killed.code == -signal.SIGKILL, killed.said
    assert (run / "state" / "state.2.json").exists()
    return run


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "deleted": lambda path: path.unlink(),
}


def flipped(content: bytes) -> bytes:
    """Return the bytes with one bit changed in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state(starter, reference, half, tmp_path, damage, record_property):
    """Each file in turn: the run goes on from the state before, or it says which file and changes nothing."""
    went_on = refused = 0
    for name in sorted(path.name for path in (half / "state").iterdir() if path.is_file()):
        run = tmp_path / name
        shutil.copytree(half, run, ignore=shutil.ignore_patterns(".lock"))
        DAMAGES[damage](run / "state" / name)
        before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
        ended = starter.start(run)
        if ended.code == 0:
            went_on += 1
            assert_same(reference, run)
        else:
            refused += 1
            assert ended.code == 2, ended.said
            assert name in one_line(ended)
            assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
        shutil.rmtree(run)
    assert went_on > 3
    assert refused > 0
    record_property("tried", went_on + refused)
    record_property("refused", refused)


def test_two_runs_in_one_folder(starter, reference, tmp_path, record_property):
    """The second is refused while the first goes on, which ends well."""
    other = Starter(starter.argv, tmp_path)
    results = []
    first = threading.Thread(target=lambda: results.append(other.start(tmp_path / "run")))
    first.start()
    while not (tmp_path / "run" / "results.json").exists():
        time.sleep(0.05)
    second = starter.start(tmp_path / "run")
    first.join()
    other.server.stdin.close()
    assert second.code == 2
    assert "is in use by another run" in one_line(second)
    assert results[0].code == 0, results[0].said
    assert_same(reference, tmp_path / "run")
    record_property("tried", 1)
