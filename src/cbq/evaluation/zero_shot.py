"""Zero-shot tasks through lm-eval: its prompts and metrics, with data that load, and MuTual scored as it is defined."""

import io
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from cbq.data.benchmarks import BENCHMARKS, load_benchmark
from cbq.data.files import quiet_datasets
from cbq.errors import InputError
from cbq.evaluation.paired import PairedDifference, mean_difference, paired_difference

HARNESS = f"lm-eval {version('lm-eval')}"
# A name of ours -> lm-eval's tasks whose mean it is.
MEANS = {
    "ethics": ("ethics_cm", "ethics_deontology", "ethics_justice", "ethics_utilitarianism", "ethics_virtue"),
}
# Where the tasks of BENCHMARKS are described: reading all 15,000 of lm-eval's takes ten seconds.
FOLDERS = ("piqa", "hellaswag", "arc", "mutual", "hendrycks_ethics")
SPLIT_OPTIONS = ("training_split", "validation_split", "test_split", "fewshot_split")  # of a task's description


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on a task.

    Args:
        metrics: by name, and the standard error of each as `<name>_stderr`.
        items: of each metric that has one, the score of every item, in the order of the data.
    """

    metrics: dict[str, float]
    items: dict[str, list[float]] = field(default_factory=dict)


class ZeroShot:
    """Some tasks, without examples in the prompt.

    Args:
        names: `ethics`, or lm-eval's names of tasks, groups or tags.
        limit: the first so many items of each task; None: all.
        data_dir: the local folder of the tasks' files, as `load_benchmark` reads them. None: the hub.

    Raises:
        InputError: the names are not a list of texts, or `limit` is below 1.
    """

    def __init__(self, names: Sequence[str], limit: int | None, data_dir: str | None) -> None:
        self.names = names
        self.limit = limit
        self.data_dir = data_dir
        self.tasks: dict[str, Task] = {}
        self.num_items: dict[str, int] = {}

    def prepare(self) -> list[str]:
        """Read every task and its data, so that a bad one is refused before any work is done.

        Returns:
            What is worth a word: tasks with another number of items than published.

        Raises:
            InputError: an unknown task, a file that is missing or damaged, or the hub cannot be reached.
        """
        names = list(dict.fromkeys(part for name in self.names for part in MEANS.get(name, (name,))))
        with quiet_harness():
            manager = task_manager(names)
            self.tasks = {}
            for name in names:
                if name not in manager.all_tasks:
                    raise InputError(
                        f"evaluation.tasks has {name!r}, which lm-eval does not know; "
                        f"the paper's are {', '.join([*BENCHMARKS, *MEANS])}"
                    )
                self.tasks |= load_tasks(manager, name, self.data_dir)
            self.num_items = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        return [
            f"{name} has {count} items, its authors published {BENCHMARKS[name].num_items}"
            for name, count in self.num_items.items()
            if name in BENCHMARKS and count != BENCHMARKS[name].num_items
        ]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return what results say of each task, and of each mean of some: how it was asked, and how many items."""
        asked = {name: min(self.limit or count, count) for name, count in self.num_items.items()}
        versions = {name: str(task.VERSION) for name, task in self.tasks.items()}
        for name, parts in self._means().items():
            asked[name] = sum(asked[part] for part in parts)
            versions[name] = " ".join(sorted({versions[part] for part in parts}))
        return {
            name: {"harness": HARNESS, "version": versions[name], "num_fewshot": 0, "num_items": asked[name]}
            for name in asked
        }

    def score(self, model: LM) -> dict[str, TaskScore]:
        """Return what a model scores on each task, and the means of `MEANS`.

        Args:
            model: as lm-eval sees it.
        """
        scores = {}
        for name, task in self.tasks.items():
            with quiet_harness():
                results = evaluate(
                    model,
                    {"tasks": {name: task}, "groups": {}, "group_map": {}},
                    limit=self.limit,
                    bootstrap_iters=1000,
                    log_samples=True,
                )
            scores[name] = task_score(results["results"][name], results["samples"][name])
        return scores | {name: mean_score([scores[part] for part in parts]) for name, parts in self._means().items()}

    def differences(
        self, full_precision: dict[str, TaskScore], quantized: dict[str, TaskScore]
    ) -> dict[str, dict[str, PairedDifference]]:
        """Return, by task and metric, what quantization did to the scores of the same items."""
        found = {
            name: {
                metric: paired_difference(items, quantized[name].items[metric])
                for metric, items in full_precision[name].items.items()
            }
            for name in self.tasks
        }
        for name, parts in self._means().items():
            found[name] = {"acc": mean_difference([found[part]["acc"] for part in parts])}
        return found

    def _means(self) -> dict[str, tuple[str, ...]]:
        """Return the means that are asked for, each with its tasks."""
        return {name: MEANS[name] for name in self.names if name in MEANS}


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
        own: dict[str, Any] = {"process_results": rank_options} if member == "mutual" else {}
        data = load_benchmark(member, data_dir)
        if data is not None:
            described = manager.task_index[member].cfg
            own |= {key: None for key in SPLIT_OPTIONS if described.get(key) not in data}
            own["custom_dataset"] = lambda data=data, **_: data
        try:
            # In a group, because only there a task's own options are laid over lm-eval's description of it.
            loaded = manager.load([{"group": "cbq", "task": [{"task": member, **own}]}])["tasks"]
            for task in loaded.values():
                task.set_config("num_fewshot", 0)
                task.doc_to_text(task.eval_docs[0])  # its columns are the task's
        except Exception as error:  # of datasets, the hub, the network, or a task's own code
            where = f"of {data_dir!r} do not fit the task" if data else "cannot be had from the hub; give data_dir"
            line = " ".join(str(error).split())[:200]
            raise InputError(f"the items of {member} {where} ({type(error).__name__}: {line})") from error
        tasks |= loaded
    return tasks


def members_of(manager: TaskManager, name: str) -> list[str]:
    """Return the tasks of a group or a tag, by name.

    Raises:
        InputError: it describes them in another way than by name.
    """
    entry = manager.task_index[name]
    listed = (entry.cfg or {}).get("task", [])
    children = entry.tags or [child if isinstance(child, str) else child.get("task", child) for child in listed]
    members = []
    for child in children:
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


def task_score(results: dict[str, Any], samples: list[dict[str, Any]]) -> TaskScore:
    """Return lm-eval's results of one task in short, and the score of each item.

    Args:
        results: by `<metric>,<filter>` and `<metric>_stderr,<filter>`.
        samples: of each item, in any order.
    """
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in results.items()
        if "," in key and isinstance(value, int | float)
    }
    ordered = sorted((sample for sample in samples if sample["filter"] == "none"), key=lambda sample: sample["doc_id"])
    items = {
        metric: [float(sample[metric]) for sample in ordered]
        for metric in metrics
        if ordered and all(isinstance(sample.get(metric), int | float) for sample in ordered)
    }
    return TaskScore(metrics, items)


def mean_score(parts: Sequence[TaskScore]) -> TaskScore:
    """Return the mean accuracy of tasks, each of the same weight."""
    return TaskScore(
        {
            "acc": math.fsum(part.metrics["acc"] for part in parts) / len(parts),
            "acc_stderr": math.hypot(*(part.metrics["acc_stderr"] for part in parts)) / len(parts),
        }
    )


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep lm-eval from logging what it does, and it and datasets from showing how far they are."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with quiet_datasets(), redirect_stderr(io.StringIO()):  # where tqdm's bars go
            yield
    finally:
        logger.setLevel(level)
