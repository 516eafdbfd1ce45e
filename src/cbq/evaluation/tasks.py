"""lm-eval's tasks, with data that load, and MuTual scored as it is defined."""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from cbq.data.benchmarks import BENCHMARKS, load_benchmark
from cbq.data.files import quiet_datasets
from cbq.errors import InputError
from cbq.models.loading import quiet_transformers

MUTUAL = ("mutual", "mutual_plus")  # whose R@1 lm-eval computes wrongly
# Where the tasks of BENCHMARKS are described: reading all 15,000 of lm-eval's takes ten seconds.
FOLDERS = ("piqa", "hellaswag", "arc", "mutual", "hendrycks_ethics")
SPLIT_OPTIONS = ("training_split", "validation_split", "test_split", "fewshot_split")  # of a task's description


def task_manager(names: Sequence[str]) -> TaskManager:
    """Return what knows lm-eval's tasks: only those of the paper where no other is asked for."""
    if not set(names) <= set(BENCHMARKS):
        return all_tasks()
    home = Path(lm_eval.tasks.__file__).parent
    return TaskManager(include_path=[home / folder for folder in FOLDERS], include_defaults=False)


@cache
def all_tasks() -> TaskManager:
    """Return what knows every task of lm-eval."""
    return TaskManager()


def load_tasks(manager: TaskManager, name: str, data_dir: str | None) -> dict[str, Task]:
    """Return the tasks of a name, with their data.

    Args:
        manager: knows the name.
        name: of a task, or of a group or tag of them.
        data_dir: the local folder, or None for the hub.

    Raises:
        InputError: the data cannot be read.
    """
    members = [name] if name in manager.all_subtasks else sorted(members_of(manager, name))
    tasks = {}
    for member in members:
        own: dict[str, Any] = {"process_results": rank_options} if member in MUTUAL else {}
        data = load_benchmark(member, data_dir)
        if data is not None:
            described = manager.task_index[member].cfg
            if "class" in described:
                raise InputError(f"{member} loads its items by code of its own, not from a folder: leave out data_dir")
            own |= {key: None for key in SPLIT_OPTIONS if described.get(key) not in data}
            own["custom_dataset"] = lambda data=data, **_: data
        try:
            # In a group, because only there a task's own options are laid over lm-eval's description of it.
            loaded = manager.load([{"group": "cbq", "task": [{"task": member, **own}]}])["tasks"]
            for task in loaded.values():
                check_askable(task)
                task.set_config("num_fewshot", 0)
                task.doc_to_text(task.eval_docs[0])  # its columns are the task's
        except InputError:
            raise
        except Exception as error:  # of datasets, the hub, the network, or a task's own code
            where = f"of {data_dir!r} do not fit the task" if data else "cannot be had from the hub; give data_dir"
            line = " ".join(str(error).split())[:200]
            raise InputError(f"the items of {member} {where} ({type(error).__name__}: {line})") from error
        tasks |= loaded
    return tasks


def check_askable(task: Task) -> None:
    """Refuse a task that a language model alone cannot be asked, or that runs what it answers.

    Raises:
        InputError: it is one.
    """
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise InputError(f"evaluation.tasks cannot have {task.task_name}: it runs generated code, or needs pictures")


def members_of(manager: TaskManager, name: str) -> list[str]:
    """Return the tasks of a group or a tag, by name.

    Raises:
        InputError: it describes them in another way than by name.
    """
    entry = manager.task_index[name]
    listed = sorted(entry.tags) if name in manager.all_tags else (entry.cfg or {}).get("task", [])
    members = []
    for child in listed:
        if not isinstance(child, str) or child not in manager.all_tasks:
            raise InputError(f"evaluation.tasks cannot have the group {name!r}: name its tasks instead")
        members += [child] if child in manager.all_subtasks else members_of(manager, child)
    return members


def rank_options(doc: dict, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Return how high a model ranks the right reply of a MuTual dialogue.

    Args:
        doc: the item; `answers` is the letter of the right option.
        results: of each option its log likelihood, and whether it is the most likely text.

    Returns:
        R@1 and R@2: 1 if the right one is the best, or one of the best two; MRR: the inverse of its rank. An option
        of the same likelihood counts as better, so that a model that says nothing gets nothing.

    Note:
        lm-eval 0.4.13's own function takes the maximum over likelihoods and flags mixed, so that its R@1 is wrong.

    Example:
        >>> rank_options({"answers": "C"}, [(-9.0, False), (-3.0, False), (-5.0, False), (-7.0, False)])
        {'r@1': 0.0, 'r@2': 1.0, 'mrr': 0.5}
    """
    likelihoods = [likelihood for likelihood, _ in results]
    right = likelihoods["ABCD".index(doc["answers"])]
    rank = sum(not likelihood < right for likelihood in likelihoods)  # itself too; and what is not a number is no right
    return {"r@1": float(rank == 1), "r@2": float(rank <= 2), "mrr": 1 / rank}


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-eval from logging what it does, and it and datasets from showing how far they are."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with quiet_datasets(), quiet_transformers(), redirect_stderr(io.StringIO()):  # where tqdm's bars go
            yield
    finally:
        logger.setLevel(level)
