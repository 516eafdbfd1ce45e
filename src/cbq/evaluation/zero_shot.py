"""Zero-shot tasks through lm-eval: what a model scores, and whether two models differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from numbers import Real
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs

from cbq.data.benchmarks import BENCHMARKS
from cbq.errors import InputError
from cbq.evaluation.harness import check_answers
from cbq.evaluation.paired import PairedDifference, mean_difference, paired_difference
from cbq.evaluation.tasks import load_tasks, quiet_harness, task_manager

HARNESS = f"lm-eval {version('lm-eval')}"
# A name of ours -> lm-eval's tasks whose mean it is.
MEANS = {
    "ethics": ("ethics_cm", "ethics_deontology", "ethics_justice", "ethics_utilitarianism", "ethics_virtue"),
}


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

    def check_answers(self, context: int) -> None:
        """Refuse tasks whose answers do not fit a model's context of so many tokens.

        Raises:
            InputError: there is one.
        """
        for task in self.tasks.values():
            if task.OUTPUT_TYPE == "generate_until":
                options = task.config.generation_kwargs or {}
                check_answers(normalize_gen_kwargs(options)["max_gen_toks"], context)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return what results say of each task, and of each mean of some: how it was asked, and how many items."""
        asked = {name: min(self.limit or count, count) for name, count in self.num_items.items()}
        versions = {name: str(task.VERSION) for name, task in self.tasks.items()}
        for name, parts in self._means().items():
            asked[name] = sum(asked[part] for part in parts)
            versions[name] = " ".join(sorted({versions[part] for part in parts}))
        higher = {name: task.higher_is_better() for name, task in self.tasks.items()}
        return {
            name: {
                "harness": HARNESS,
                "version": versions[name],
                "num_fewshot": 0,
                "num_items": asked[name],
                "higher_is_better": {
                    metric: bool(better) for metric, better in higher.get(name, {"acc": True}).items()
                },
            }
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
    items = {}
    for metric, mean in metrics.items():
        name, _, variant = metric.partition(",")
        found = [sample for sample in samples if sample["filter"] == (variant or "none")]
        scores = [sample.get(name) for sample in sorted(found, key=lambda sample: sample["doc_id"])]
        if scores and all(isinstance(score, Real | np.bool_) for score in scores):
            scores = [float(score) for score in scores]
            # Of other metrics, such as a perplexity, an item has something else than the metric.
            if math.isclose(math.fsum(scores) / len(scores), mean, rel_tol=1e-6, abs_tol=1e-9):
                items[metric] = scores
    return TaskScore(metrics, items)


def mean_score(parts: Sequence[TaskScore]) -> TaskScore:
    """Return the mean accuracy of tasks, each of the same weight."""
    return TaskScore(
        {
            "acc": math.fsum(part.metrics["acc"] for part in parts) / len(parts),
            # lm-eval has none where a task has one item.
            "acc_stderr": math.hypot(*(part.metrics.get("acc_stderr", math.nan) for part in parts)) / len(parts),
        }
    )
