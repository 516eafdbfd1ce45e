"""The calibration sample: N random segments of T tokens of one corpus, seeded."""

from dataclasses import dataclass
from typing import Any

from torch import LongTensor

from cbq.data.corpora import C4, Corpus, Embedded, TextFile, Tokenizer, WikiText2, check_count
from cbq.errors import InputError, check_text

MOST_TOKENS = 10**8  # 400 times the paper's: their ids alone are a GB


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Args:
        corpus: the text.
        num_segments: N, at least 1; the paper has 128.
        segment_tokens: T, at least 1 and at most the model's context; the paper has 2048.
    """

    corpus: Corpus
    num_segments: int
    segment_tokens: int

    def sample(self, tokenizer: Tokenizer, vocab_size: int, context: int, seed: int) -> LongTensor:
        """Draw the segments.

        Args:
            tokenizer: turns the text into ids.
            vocab_size: the rows of the model's embedding; every id must be below.
            context: the most tokens that the model was made for.
            seed: the same seed gives the same segments.

        Returns:
            Token ids, (N, T).

        Raises:
            InputError: a number is not an integer of at least 1, there are more than `MOST_TOKENS`, a segment is longer
                than the context, an id lies beyond the vocabulary, or the corpus cannot be read or is too short.
        """
        check_count("calibration.num_segments", self.num_segments)
        check_segment_tokens("calibration.segment_tokens", self.segment_tokens, context)
        most = MOST_TOKENS // self.segment_tokens
        if self.num_segments > most:
            raise InputError(
                f"calibration.num_segments must be at most {most} of {self.segment_tokens} tokens, "
                f"got {self.num_segments}"
            )
        segments = self.corpus.random_segments(tokenizer, self.num_segments, self.segment_tokens, seed)
        check_token_ids(segments, vocab_size, self.corpus.name)
        return segments

    def describe(self) -> dict[str, Any]:
        """Return what results say of the calibration: the corpus, its size, and the hash of the text drawn from."""
        return {
            "name": self.corpus.name,
            "num_segments": self.num_segments,
            "segment_tokens": self.segment_tokens,
            "sha256": self.corpus.sha256("calibration"),
        }


def calibrate_on_embedded(num_segments: int, segment_tokens: int) -> Calibration:
    """Return the calibration on the text that the package ships."""
    return Calibration(Embedded(), num_segments, segment_tokens)


def calibrate_on_text(path: str, num_segments: int, segment_tokens: int) -> Calibration:
    """Return the calibration on a local text file."""
    check_text("calibration.path", path)
    return Calibration(TextFile(path), num_segments, segment_tokens)


def calibrate_on_wikitext2(data_dir: str | None, num_segments: int, segment_tokens: int) -> Calibration:
    """Return the calibration on WikiText-2's train split, from a local folder or (None) the hub."""
    return Calibration(WikiText2(data_dir), num_segments, segment_tokens)


def calibrate_on_c4(data_dir: str | None, num_segments: int, segment_tokens: int) -> Calibration:
    """Return the calibration on C4's first training file, from a local folder or (None) the hub."""
    return Calibration(C4(data_dir), num_segments, segment_tokens)


def check_segment_tokens(name: str, segment_tokens: int, context: int) -> None:
    """Refuse a segment that is no length, or longer than the model's context.

    Raises:
        InputError: it is.

    Example:
        >>> check_segment_tokens("segment_tokens", 1024, context=512)
        Traceback (most recent call last):
        cbq.errors.InputError: segment_tokens must be at most 512, the model's context, got 1024
    """
    check_count(name, segment_tokens)
    if segment_tokens > context:
        raise InputError(f"{name} must be at most {context}, the model's context, got {segment_tokens}")


def check_token_ids(segments: LongTensor, vocab_size: int, corpus: str) -> None:
    """Refuse token ids for which the model has no embedding.

    Args:
        segments: token ids, (N, T).
        vocab_size: the rows of the model's embedding.
        corpus: what the error calls the text.

    Raises:
        InputError: an id is too large.

    Example:
        >>> import torch
        >>> check_token_ids(torch.tensor([[3, 9]]), vocab_size=9, corpus="c4")
        Traceback (most recent call last):
        cbq.errors.InputError: the tokenizer gives id 9 for the text 'c4', but the model's vocabulary has 9 ids
    """
    largest = int(segments.max())
    if largest >= vocab_size:
        raise InputError(
            f"the tokenizer gives id {largest} for the text {corpus!r}, but the model's vocabulary has {vocab_size} ids"
        )
