"""Perplexity on non-overlapping segments, with float32 logits.

Shapes: N segments, B batch, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import LongTensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from cbq.data.calibration import check_segment_tokens, check_token_ids
from cbq.data.corpora import CORPORA, Corpus, TextFile, Tokenizer, check_count
from cbq.errors import InputError, check_flag, check_text


class PerplexityEvaluation:
    """The perplexity of a model on some corpora. `prepare` reads the texts; `perplexity` then takes any model."""

    def __init__(
        self,
        corpora: list[str],
        segment_tokens: int,
        text_path: str | None = None,
        data_dir: str | None = None,
        batch_size: int = 8,
        baselines: bool = True,
    ) -> None:
        """Say what to evaluate on; nothing is read yet.

        Args:
            corpora: names out of `CORPORA`; none at all is allowed.
            segment_tokens: T, at least 2 and at most the model's context; the paper has 2048.
            text_path: a text file that replaces the corpora by one called `text`.
            data_dir: the local folder of the corpora's files; None: the hub.
            batch_size: the segments that go through the model at once; says nothing about the result.
            baselines: measure full precision and round-to-nearest too: the same for every cell of an ablation.

        Raises:
            InputError: an unknown corpus, a `batch_size` below 1, or `baselines` is no flag.
        """
        check_flag("evaluation.baselines", baselines)
        check_count("evaluation.batch_size", batch_size)
        check_text("evaluation.text_path", text_path, optional=True)
        check_text("evaluation.data_dir", data_dir, optional=True)
        corpora = [corpora] if isinstance(corpora, str) else corpora  # evaluation.corpora=c4 means what it seems to
        if not isinstance(corpora, Sequence):
            raise InputError(f"evaluation.corpora must be a list of {', '.join(CORPORA)}, got {corpora!r}")
        unknown = [name for name in corpora if not isinstance(name, str) or name not in CORPORA]
        if unknown:
            raise InputError(f"evaluation.corpora has unknown names {unknown}; known: {', '.join(CORPORA)}")
        chosen: list[Corpus] = [CORPORA[name](data_dir) for name in corpora]
        self.corpora = chosen if text_path is None else [TextFile(text_path)]
        self.segment_tokens = segment_tokens
        self.batch_size = batch_size
        self.baselines = baselines
        self.segments: dict[str, LongTensor] | None = None

    def prepare(self, tokenizer: Tokenizer, vocab_size: int, context: int) -> dict[str, LongTensor]:
        """Read and cut every text, so that a bad one is refused before any work is done.

        Args:
            tokenizer: turns the texts into ids.
            vocab_size: the rows of the model's embedding; every id must be below.
            context: the most tokens that the model was made for.

        Returns:
            Token ids by corpus, (N, T); also kept for `perplexity`.

        Raises:
            InputError: a segment is shorter than 2 tokens or longer than the context, an id lies beyond the
                vocabulary, or a corpus cannot be read or is too short.
        """
        segments: dict[str, LongTensor] = {}
        if self.corpora:
            check_segment_tokens("evaluation.segment_tokens", self.segment_tokens, context)
            if self.segment_tokens < 2:  # the first token of a segment is not predicted
                raise InputError(f"evaluation.segment_tokens must be at least 2, got {self.segment_tokens}")
        for corpus in self.corpora:
            segments[corpus.name] = corpus.test_segments(tokenizer, self.segment_tokens)
            check_token_ids(segments[corpus.name], vocab_size, corpus.name)
        self.segments = segments
        return segments

    def protocol(self) -> dict[str, dict[str, Any]]:
        """Return what results say of each corpus: T, the N * T tokens read, and the hash of the text."""
        assert self.segments is not None, "prepare comes first"
        return {
            corpus.name: {
                "segment_tokens": self.segment_tokens,
                "num_tokens": self.segments[corpus.name].numel(),
                "text_sha256": corpus.sha256("test"),
            }
            for corpus in self.corpora
        }

    def perplexity(self, model: nn.Module) -> dict[str, float]:
        """Return the model's perplexity by corpus: exp of the mean over all predicted tokens.

        Args:
            model: a causal language model in eval mode, on the device that it shall run on.
        """
        assert self.segments is not None, "prepare comes first"
        return {
            name: float(mean_token_nll(model, segments, self.batch_size).exp())
            for name, segments in self.segments.items()
        }


@torch.no_grad()  # not inference_mode: position tables that a model caches in it could then not be trained through
def mean_token_nll(model: nn.Module, segments: LongTensor, batch_size: int) -> torch.Tensor:
    """Return the mean negative log likelihood, in nats, of every token given those before it in its segment.

    Args:
        model: a causal language model in eval mode; the segments go to its device.
        segments: token ids, (N, T), T at least 2: the first token of a segment is not predicted.
        batch_size: B, at least 1.

    Returns:
        A float64 scalar.
    """
    # float64, because a float32 sum over 10^5 tokens would depend on how they are batched.
    mean = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)  # by default it would drop what is not a number
    device = next(model.parameters()).device
    for batch in segments.split(batch_size):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits  # (B, T, V)
        for segment, segment_logits in zip(batch, logits, strict=True):  # one at a time: V makes float32 copies large
            nll = F.cross_entropy(segment_logits[:-1].float(), segment[1:], reduction="none")  # (T - 1,)
            mean.update(nll.double().cpu())
    return mean.compute()
