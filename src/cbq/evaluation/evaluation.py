"""What is measured of a model: perplexities, zero-shot tasks, and agreement with full precision."""

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from cbq.data.corpora import check_count
from cbq.errors import InputError, check_flag, check_text, expanded
from cbq.evaluation.agreement import Agreement, Reference, compare, remember
from cbq.evaluation.perplexity import HeldOutTexts, TextScore, mean_token_nll, text_score
from cbq.evaluation.recall import Recall, fingerprint, hash_tokens
from cbq.models.loading import LoadedModel

NOT_RECALLED = Recall(None)
PROTOCOL_VERSION = "1"  # to be raised when any score would come out otherwise: what is remembered is then forgotten


def circumstances() -> tuple[str, ...]:
    """Return what decides scores besides the model and the data."""
    return (
        PROTOCOL_VERSION,
        version("transformers"),
        torch.__version__,
        torch.get_float32_matmul_precision(),
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    )


def show_nothing(elements: Sequence, description: str) -> Iterable:
    """Return the elements: in place of what shows how far they are."""
    return elements


@dataclass
class Scores:
    """What one model scored.

    Args:
        texts: by corpus.
        tasks: by task, as `zero_shot.TaskScore`.
    """

    texts: dict[str, TextScore] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)


class Evaluation:
    """What to measure. `prepare` reads everything; `score` then takes any state of the model.

    Args:
        corpora: texts whose perplexity is measured, out of `CORPORA`; none at all is allowed.
        segment_tokens: T, at least 2 and at most the model's context; the paper has 2048.
        stride: from a segment to the next, 1 to T - 1; None: segments do not overlap.
        text_path: a text file that replaces the corpora by one called `text`.
        data_dir: the local folder of the corpora's and tasks' files; None: the hub.
        batch_tokens: the most tokens that go through the model at once.
        tasks: zero-shot tasks: `ethics`, or lm-eval's names.
        limit: the first so many items of each task; None: all.
        agreement_tokens: how many tokens of each corpus, in whole segments, are compared with full precision; 0: none.
        baselines: measure full precision and round-to-nearest too: the same for every cell of an ablation.
        cache_dir: where the scores of full precision are remembered for the other runs; None: nowhere.

    Raises:
        InputError: something is out of range or unknown.
    """

    def __init__(
        self,
        corpora: list[str],
        segment_tokens: int,
        stride: int | None = None,
        text_path: str | None = None,
        data_dir: str | None = None,
        batch_tokens: int = 16384,
        tasks: Sequence[str] = (),
        limit: int | None = None,
        agreement_tokens: int = 16384,
        baselines: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        check_flag("evaluation.baselines", baselines)
        check_count("evaluation.batch_tokens", batch_tokens)
        check_text("evaluation.cache_dir", cache_dir, optional=True)
        if agreement_tokens != 0:
            check_count("evaluation.agreement_tokens", agreement_tokens)
        if limit is not None:
            check_count("evaluation.limit", limit)
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(tasks, Sequence) or not all(isinstance(name, str) and name for name in tasks):
            raise InputError(f"evaluation.tasks must be a list of names, got {tasks!r}")
        self.held_out = HeldOutTexts(corpora, segment_tokens, stride, text_path, data_dir)
        self.batch_tokens = batch_tokens
        self.agreement_tokens = agreement_tokens
        self.baselines = baselines
        self.cache_dir = cache_dir
        self.recall = NOT_RECALLED
        self.zero_shot = None
        self.task_options = {"names": list(tasks), "limit": limit, "data_dir": data_dir}

    def prepare(self, loaded: LoadedModel, full_precision: bool = True) -> list[str]:
        """Read every text and task, so that a bad one is refused before any work is done.

        Args:
            loaded: the model.
            full_precision: its scores are worth remembering, now that it is as it came.

        Returns:
            What is worth a word about the data.

        Raises:
            InputError: data are missing, damaged or do not fit the model.
        """
        self.held_out.prepare(loaded.tokenizer, loaded.model.config.get_text_config().vocab_size, loaded.context)
        measured = self.held_out.texts or self.task_options["names"]
        self.recall = NOT_RECALLED
        if self.cache_dir is not None and full_precision and measured and self.baselines:
            self.recall = Recall(expanded(self.cache_dir), (fingerprint(loaded.model), *circumstances()))
        if not self.task_options["names"]:
            return []
        from cbq.evaluation.zero_shot import ZeroShot  # seconds, that a run without tasks need not wait

        self.zero_shot = ZeroShot(**self.task_options)
        notes = self.zero_shot.prepare()
        self.zero_shot.check_answers(loaded.context)
        return notes

    def protocol(self) -> dict[str, dict[str, Any]]:
        """Return what results say of each corpus: T, the stride, the N * T tokens read, and the hash of the text."""
        return self.held_out.protocol()

    def corpora(self) -> list[str]:
        """Return the names of the texts."""
        return list(self.held_out.texts)

    def score(
        self,
        loaded: LoadedModel,
        recall: Recall = NOT_RECALLED,
        track: Callable[[Sequence, str], Iterable] = show_nothing,
    ) -> Scores:
        """Return what a model scores on all texts and tasks.

        Args:
            loaded: the model in the state that is measured, in eval mode, on the device that it shall run on.
            recall: `self.recall` where the model is the one that `prepare` saw, in full precision.
            track: shows how far a sequence is.
        """
        scores = self.score_texts(loaded, recall, track)
        if self.zero_shot is not None:
            from cbq.evaluation.harness import HarnessModel

            scores.tasks = self.zero_shot.score(HarnessModel(loaded, self.batch_tokens, recall, track))
        return scores

    def score_texts(
        self,
        loaded: LoadedModel,
        recall: Recall = NOT_RECALLED,
        track: Callable[[Sequence, str], Iterable] = show_nothing,
    ) -> Scores:
        """Return the same of the texts alone."""
        scores = Scores()
        stride = self.held_out.stride
        for name, text in self.held_out.texts.items():
            batches = text.segments.split(max(1, self.batch_tokens // text.segments.shape[1]))
            key = ("nll", hash_tokens([text.segments]), str(stride), str(self.batch_tokens))

            def compute(batches: Sequence = batches, name: str = name) -> float:
                return float(mean_token_nll(loaded.model, track(batches, f"perplexity on {name}"), stride))

            scores.texts[name] = text_score(recall(key, compute), text.bytes_per_token)
        return scores

    def remember(self, loaded: LoadedModel) -> dict[str, Reference]:
        """Keep, by corpus, what the full-precision model computes, to compare the quantized one with."""
        return {
            name: remember(loaded.model, loaded.blocks, text.segments[: self._num_compared(text.segments)])
            for name, text in self.held_out.texts.items()
            if self.agreement_tokens
        }

    def agreement(self, loaded: LoadedModel, references: dict[str, Reference]) -> dict[str, Agreement]:
        """Return, by corpus, how far the model is from what was kept."""
        return {name: compare(loaded.model, loaded.blocks, reference) for name, reference in references.items()}

    def results(
        self,
        full_precision: Scores | None,
        rtn: Scores | None,
        quantized: Scores | None,
        agreement: dict[str, Agreement],
        nearest: dict[str, Agreement] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Return what `results.json` says of what was measured: perplexity, bits_per_byte, zero_shot, agreement.

        Args:
            full_precision: of the model before quantization; None where it was not measured, here and below.
            rtn: of round-to-nearest.
            quantized: of the quantized model.
            agreement: by corpus.
            nearest: likewise, of round-to-nearest; None where it was not measured.
        """
        states = {"full_precision": full_precision, "rtn": rtn, "quantized": quantized}
        by_text = {
            figure: {
                corpus: {state: scores and getattr(scores.texts[corpus], figure) for state, scores in states.items()}
                for corpus in self.corpora()
            }
            for figure in ("perplexity", "bits_per_byte")
        }
        return by_text | {
            "zero_shot": self._zero_shot_results(full_precision, quantized),
            "agreement": {
                corpus: asdict(found) | ({"rtn": asdict(nearest[corpus])} if nearest else {})
                for corpus, found in agreement.items()
            },
        }

    def _zero_shot_results(self, full_precision: Scores | None, quantized: Scores | None) -> dict[str, dict[str, Any]]:
        """Return by task how it was asked, what both models scored, and whether they differ."""
        if self.zero_shot is None:
            return {}
        before = full_precision.tasks if full_precision else {}
        after = quantized.tasks if quantized else {}
        differences = self.zero_shot.differences(before, after) if before and after else {}
        described = self.zero_shot.describe()
        return {
            task: described[task]
            | {
                "full_precision": before[task].metrics if before else {},
                "quantized": after[task].metrics if after else {},
                "difference": {metric: asdict(found) for metric, found in differences.get(task, {}).items()},
            }
            for task in before or after
        }

    def _num_compared(self, segments: torch.Tensor) -> int:
        """Return how many of the segments, (N, T), are compared with full precision."""
        return min(len(segments), max(1, self.agreement_tokens // segments.shape[1]))
