"""Perplexity on segments of held-out texts, with float32 logits.

Shapes: N segments, B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import LongTensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from cbq.data.calibration import check_segment_tokens, check_token_ids
from cbq.data.corpora import CORPORA, Corpus, HeldOut, TextFile, Tokenizer, check_count
from cbq.errors import InputError, check_text


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Args:
        nll: mean negative log likelihood of the predicted tokens, in nats.
        perplexity: its exponential.
        bits_per_byte: the same for a byte of the text, so that models with different tokenizers compare.
    """

    nll: float
    perplexity: float
    bits_per_byte: float


class HeldOutTexts:
    """The texts that perplexities are measured on.

    Args:
        corpora: names out of `CORPORA`; none at all is allowed.
        segment_tokens: T, at least 2 and at most the model's context; the paper has 2048.
        stride: from the start of a segment to that of the next, 1 to T - 1: every segment but the first then only
            predicts its last `stride` tokens, and has the others as context. None: segments do not overlap, and all
            their tokens but the first are predicted.
        text_path: a text file that replaces the corpora by one called `text`.
        data_dir: the local folder of the corpora's files; None: the hub.

    Raises:
        InputError: an unknown corpus, or a `stride` below 1.
    """

    def __init__(
        self, corpora: list[str], segment_tokens: int, stride: int | None, text_path: str | None, data_dir: str | None
    ) -> None:
        check_text("evaluation.text_path", text_path, optional=True)
        check_text("evaluation.data_dir", data_dir, optional=True)
        if stride is not None:
            check_count("evaluation.stride", stride)
        corpora = [corpora] if isinstance(corpora, str) else corpora  # evaluation.corpora=c4 means what it seems to
        if not isinstance(corpora, Sequence):
            raise InputError(f"evaluation.corpora must be a list of {', '.join(CORPORA)}, got {corpora!r}")
        unknown = [name for name in corpora if not isinstance(name, str) or name not in CORPORA]
        if unknown:
            raise InputError(f"evaluation.corpora has unknown names {unknown}; known: {', '.join(CORPORA)}")
        chosen: list[Corpus] = [CORPORA[name](data_dir) for name in corpora]
        self.corpora = chosen if text_path is None else [TextFile(text_path)]
        self.segment_tokens = segment_tokens
        self.stride = stride
        self.texts: dict[str, HeldOut] = {}

    def prepare(self, tokenizer: Tokenizer, vocab_size: int, context: int) -> dict[str, HeldOut]:
        """Read and cut every text, so that a bad one is refused before any work is done.

        Args:
            tokenizer: turns the texts into ids.
            vocab_size: the rows of the model's embedding; every id must be below.
            context: the most tokens that the model was made for.

        Returns:
            The texts by corpus; also kept in `texts`.

        Raises:
            InputError: a segment is shorter than 2 tokens or longer than the context, an id lies beyond the
                vocabulary, or a corpus cannot be read or is too short.
        """
        self.texts = {}
        if self.corpora:
            check_segment_tokens("evaluation.segment_tokens", self.segment_tokens, context)
            if self.segment_tokens < 2:  # the first token of a segment is not predicted
                raise InputError(f"evaluation.segment_tokens must be at least 2, got {self.segment_tokens}")
        for corpus in self.corpora:
            text = corpus.held_out(tokenizer, self.segment_tokens, self.stride or self.segment_tokens)
            check_token_ids(text.segments, vocab_size, corpus.name)
            self.texts[corpus.name] = text
        return self.texts

    def protocol(self) -> dict[str, dict[str, Any]]:
        """Return what results say of each corpus: T, the stride, the N * T tokens read, and the hash of the text."""
        return {
            corpus.name: {
                "segment_tokens": self.segment_tokens,
                "stride": self.stride or self.segment_tokens,
                "num_tokens": self.texts[corpus.name].segments.numel(),
                "text_sha256": corpus.sha256("test"),
            }
            for corpus in self.corpora
        }


def text_score(nll: float, bytes_per_token: float) -> TextScore:
    """Return how well a text is predicted, from the mean negative log likelihood of its tokens in nats.

    Example:
        >>> text_score(math.log(2), bytes_per_token=4.0).bits_per_byte
        0.25
    """
    perplexity = float(torch.tensor(nll, dtype=torch.float64).exp())  # math.exp would raise where it overflows
    return TextScore(nll, perplexity, nll / math.log(2) / bytes_per_token)


@torch.no_grad()  # not inference_mode: position tables that a model caches in it could then not be trained through
def mean_token_nll(model: nn.Module, batches: Iterable[LongTensor], stride: int | None = None) -> torch.Tensor:
    """Return the mean negative log likelihood, in nats, of tokens given those before them in their segment.

    Args:
        model: a causal language model in eval mode; the segments go to its device.
        batches: token ids, each (B, T), T at least 2: the first token of a segment is not predicted.
        stride: below T: only that many tokens at the end of a segment are predicted, of the very first one all.

    Returns:
        A float64 scalar.
    """
    # float64, because a float32 sum over 10^5 tokens would depend on how they are batched.
    mean = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)  # by default it would drop what is not a number
    device = next(model.parameters()).device
    first = 1
    for batch in batches:
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits  # (B, T, V)
        for segment, segment_logits in zip(batch, logits, strict=True):  # one at a time: V makes float32 copies large
            target = segment[first:]
            nll = F.cross_entropy(segment_logits[first - 1 : -1].float(), target, reduction="none")
            mean.update(nll.double().cpu())
            first = max(1, len(segment) - stride) if stride else 1
    return mean.compute()
