"""A model in memory as lm-eval sees it: batches of so many tokens, float32 log-probabilities, remembered answers."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from cbq.errors import InputError
from cbq.evaluation.recall import hash_tokens
from cbq.models.loading import LoadedModel

Track = Callable[[Sequence, str], Iterable]  # the elements of a sequence, what is done with them -> the elements
Request = tuple[tuple[str, str], list[int], list[int]]  # both strings, the question's ids, the answer's ids


class HarnessModel(HFLM):
    """lm-eval's own wrapper of a transformers model, but for the size of its batches and where answers come from.

    Args:
        loaded: the model and its tokenizer.
        batch_tokens: the most tokens that go through the model at once, padding included.
        recall: returns what was computed before for a key, or computes it.
        track: shows how far an iterable is.
    """

    def __init__(
        self, loaded: LoadedModel, batch_tokens: int, recall: Callable[[Sequence[str], Callable], Any], track: Track
    ) -> None:
        level = logging.getLogger("lm_eval").level
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that it did not load itself
        try:
            super().__init__(
                pretrained=loaded.model,
                tokenizer=deepcopy(loaded.tokenizer),  # it may be given a padding token
                batch_size=max(1, batch_tokens // loaded.context),  # of what is as long as the context can be
                max_length=loaded.context,
                softmax_dtype=torch.float32,
            )
        finally:
            logging.getLogger("lm_eval").setLevel(level)
        self.batch_tokens = batch_tokens
        self.recall = recall
        self.track = track
        self._ticks: Iterator[int] = iter(())

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return the log likelihood of each answer, and whether it is the most likely text.

        Raises:
            InputError: an answer is longer than the context.
        """
        longest = max((len(answer) for _, _, answer in requests), default=0)
        if longest > self.max_length:
            raise InputError(f"an answer has {longest} tokens, more than the model's context of {self.max_length}")
        ids = [torch.tensor(part) for _, question, answer in requests for part in (question, answer)]
        key = ("loglikelihood", version("lm-eval"), hash_tokens(ids), str(self.max_length), str(self.batch_tokens))
        answers = self.recall(key, lambda: self._computed(requests, override_bs))
        return [(likelihood, greedy) for likelihood, greedy in answers]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each question, by lm-eval's own method.

        Raises:
            InputError: an answer may be as long as the context.
        """
        asked = [normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests]
        check_answers(max(asked, default=0), self.max_length)
        return super().generate_until(requests, disable_tqdm)

    def _computed(self, requests: list[Request], override_bs: int | None) -> list[tuple[float, bool]]:
        """Return the answers by lm-eval's own method, in batches that `_batch_scheduler` ends."""
        fixed = self.batch_size_per_gpu
        self.batch_size_per_gpu = "auto" if override_bs is None else override_bs
        try:
            return super()._loglikelihood_tokens(requests, True, override_bs)
        finally:
            self.batch_size_per_gpu = fixed
            for _ in self._ticks:  # ends what is shown
                pass

    @torch.no_grad()
    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits of a batch, and say that it is done; keys and values are not kept, as lm-eval would."""
        logits = self.model(inps, use_cache=False).logits
        next(self._ticks, None)
        return logits

    def _batch_scheduler(self, pos: int, requests: Sequence[Request]) -> int:
        """Return the size of the batch that ends at `pos`, or 0 if none does; lm-eval asks at every request in turn."""
        if pos == 0:
            # The last token of an answer is predicted, not read.
            lengths = [min(len(question) + len(answer) - 1, self.max_length) for _, question, answer in requests]
            self._ends = batch_ends(lengths, self.batch_tokens)
            self._ticks = iter(self.track(range(len(self._ends)), "zero-shot"))
        return self._ends.get(pos, 0)


def check_answers(most: int, context: int) -> None:
    """Refuse answers that leave no room for a question.

    Args:
        most: tokens of an answer.
        context: of the model.

    Raises:
        InputError: they do.
    """
    if most >= context:
        raise InputError(
            f"evaluation.tasks has one whose answers may have {most} tokens: with a question they do not fit the "
            f"model's context of {context}"
        )


def batch_ends(lengths: Sequence[int], batch_tokens: int) -> dict[int, int]:
    """Return where batches of no more than `batch_tokens` end, padding included.

    Args:
        lengths: of requests in tokens, the longest first.
        batch_tokens: at least 1; a longer request is a batch of its own.

    Returns:
        The size of each batch by the position of its last request.

    Example:
        >>> batch_ends([5, 4, 3, 2, 2], batch_tokens=10)  # 2 of up to 5 tokens, then 3 of up to 3
        {1: 2, 4: 3}
    """
    ends, start = {}, 0
    while start < len(lengths):
        size = min(max(1, batch_tokens // lengths[start]), len(lengths) - start)
        ends[start + size - 1] = size
        start += size
    return ends
