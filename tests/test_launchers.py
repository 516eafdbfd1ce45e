"""A sweep's jobs beside each other: in processes of this machine, and as jobs of a scheduler."""

import json
import multiprocessing
import os
import stat
import subprocess
import sys
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cbq.cli import conf_dir
from cbq.cli.mistakes import EXTRAS
from cbq.cli.resolvers import device_of_job, num_workers, own_gpu

ROOT = Path(__file__).resolve().parents[1]
JOB = [
    "tracking.mode=disabled",
    "report=none",
    "calibration.num_segments=2",
    "calibration.segment_tokens=32",
    "evaluation.corpora=[]",
    "reconstruction=none",
]
# What a login node has, as far as a launcher calls it: an array's jobs run one after the other, and are asked for.
SBATCH = """#!{python}
import subprocess, sys
words = [sys.executable, __file__.replace("sbatch", "array"), sys.argv[-1]]
subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
print("Submitted batch job 7")
"""
ARRAY = """#!{python}
import os, re, subprocess, sys
first, last = re.search(r"--array=(\\d+)-(\\d+)", open(sys.argv[1]).read()).groups()
for task in range(int(first), int(last) + 1):
    names = {{"JOB_ID": f"7{{task}}", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": str(task), "NTASKS": "1",
             "JOB_NUM_NODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NODELIST": "node"}}
    environment = os.environ | {{f"SLURM_{{name}}": value for name, value in names.items()}}
    subprocess.run(["bash", sys.argv[1]], env=environment)
open(__file__ + ".done", "w").close()
"""
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2:] if words[0] in ("--output", "--error") else words[1:]
os.execvp(words[0], words)
"""
SACCT = """#!{python}
import os
state = "COMPLETED" if os.path.exists(__file__.replace("sacct", "array.done")) else "RUNNING"
print(f"JobID|State|NodeList\\n7_0|{{state}}|node\\n7_1|{{state}}|node")
"""


def sweep(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a sweep as a user does, in a folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "-m", *JOB, "hydra.sweep.dir=sweep", *words],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def statuses(folder: Path) -> dict[int, str]:
    """Return what became of each window's size."""
    found = [json.loads(path.read_text()) for path in folder.rglob("results.json")]
    return {results["settings"]["cbd.window"]: results["status"] for results in found}


@pytest.mark.slow
def test_jobs_in_processes_of_this_machine(tmp_path):
    """Two that work and one that cannot: it ends neither the others nor in silence."""
    process = sweep(tmp_path, "hydra/launcher=parallel", "hydra.launcher.n_jobs=2", "cbd.window=8,4,9")
    assert process.returncode == 2
    assert "job 2 failed (cbd.window must be at most the model's 8 blocks, got 9)" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr
    assert statuses(tmp_path) == {8: "finished", 4: "finished", 9: "failed"}


@pytest.mark.slow
def test_jobs_of_a_scheduler(tmp_path):
    process = sweep(tmp_path, "hydra/launcher=submitit_local", "cbd.window=8,4")
    assert process.returncode == 0, process.stderr
    assert statuses(tmp_path) == {8: "finished", 4: "finished"}


@pytest.mark.slow
def test_an_array_of_slurm_jobs(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"sbatch": SBATCH, "array": ARRAY, "srun": SRUN, "sacct": SACCT}.items():
        (commands / name).write_text(text.format(python=sys.executable))
        (commands / name).chmod(stat.S_IRWXU)
    options = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "cbd.window=8,4"]
    process = sweep(tmp_path, *options, PATH=f"{commands}{os.pathsep}{os.environ['PATH']}")
    assert process.returncode == 0, process.stderr
    assert statuses(tmp_path) == {8: "finished", 4: "finished"}
    script = next(tmp_path.rglob("*submission.sh")).read_text()
    for line in ("--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=8", "--time=720", "--array=0-1%2"):
        assert f"#SBATCH {line}\n" in script


def take_gpu(sender: Connection, stay: Event) -> None:
    """In a process of its own: send the GPUs of two jobs, and stay."""
    sender.send((device_of_job(0), device_of_job(1)))
    stay.wait()


def test_each_process_takes_a_free_gpu(tmp_path, monkeypatch):
    """Two at once have one each; a third goes round; when one ends, its GPU is free."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own_gpu.cache_clear()
    processes = multiprocessing.get_context("fork")
    events = [processes.Event() for _ in range(4)]
    taken, started = [], []
    for number, event in enumerate(events):
        if number == 3:
            events[0].set()
            started[0].join()
        receiver, sender = processes.Pipe()
        process = processes.Process(target=take_gpu, args=(sender, event))
        process.start()
        taken.append(receiver.recv())
        started.append(process)
    for event in events:
        event.set()
    assert taken == [("2", "2"), ("GPU-5", "GPU-5"), ("2", "GPU-5"), ("2", "2")]


def test_parallel_jobs_by_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own_gpu.cache_clear()
    assert num_workers() == 2
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("config", ["hydra/launcher=parallel"], return_hydra_config=True)
    config.hydra.job.num = 1
    assert config.hydra.job.env_set.CUDA_VISIBLE_DEVICES == "2"
    assert config.hydra.launcher.n_jobs == 2
    own_gpu.cache_clear()


def test_a_running_ray_cluster_is_given_no_memory_size():
    """The plugin gives one unless there is one, and Ray refuses it for a cluster that runs."""
    init = OmegaConf.load(Path(conf_dir()) / "hydra" / "launcher" / "ray_cluster.yaml").ray.init
    assert init.address == "auto"
    assert "object_store_memory" in init
    assert init.object_store_memory is None


def test_without_gpus_a_job_a_core(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_workers() == len(os.sched_getaffinity(0))
    assert device_of_job(3) == ""


@pytest.mark.slow
def test_a_launcher_names_its_extra(tmp_path, monkeypatch):
    """With the search for plugins finding none."""
    code = (
        "import sys; from hydra.core.plugins import Plugins; from hydra.core.config_store import ConfigStore; "
        "load = ConfigStore.instance().repo; from cbq.cli import main; Plugins.instance(); "
        "load['hydra']['launcher'].pop('joblib.yaml'); sys.argv[1:] = ['-m', 'hydra/launcher=parallel']; main()"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["cbq: this launcher needs an extra: pip install 'cbq[joblib]'"]


def test_every_launcher_has_an_extra():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])
    files = {path.stem for path in (Path(conf_dir()) / "hydra" / "launcher").glob("*.yaml")}
    assert len(files) == len(EXTRAS)
