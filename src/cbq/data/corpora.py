"""The texts: embedded, a local file, WikiText-2 and C4, cut into segments of token ids.

Shapes: N segments, T tokens.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import LongTensor

from cbq.data.files import find_file, read_rows, read_text
from cbq.errors import InputError, expanded

Split = Literal["calibration", "test"]
# Any callable with the interface of a transformers tokenizer: `tokenizer(text, verbose=False)["input_ids"]`.
Tokenizer = Callable[..., Any]

# The field's protocol for C4: so many segments of the validation documents, drawn with Python's generator and seed 0.
C4_TEST_SEGMENTS = 256


@dataclass(frozen=True)
class HeldOut:
    """A test text, cut.

    Args:
        segments: token ids, (N, T).
        bytes_per_token: the mean length in UTF-8 of what its tokens stand for.
    """

    segments: LongTensor
    bytes_per_token: float


class Corpus(Protocol):
    """A text with a part to calibrate on and a part to test on."""

    name: str

    def random_segments(self, tokenizer: Tokenizer, num_segments: int, segment_tokens: int, seed: int) -> LongTensor:
        """Return `num_segments` random segments of the calibration part, (N, T)."""
        ...

    def held_out(self, tokenizer: Tokenizer, segment_tokens: int, stride: int) -> HeldOut:
        """Return the segments of the test part, each `stride` tokens after the one before it."""
        ...

    def sha256(self, split: Split) -> str:
        """Return the hash of a part's text in UTF-8, in hexadecimal."""
        ...


class RunningText(ABC):
    """A corpus that is one long text a part: subclasses say its `name` and give the `text`."""

    name: str

    @abstractmethod
    def text(self, split: Split) -> str:
        """Return the whole text of a part."""

    def random_segments(self, tokenizer: Tokenizer, num_segments: int, segment_tokens: int, seed: int) -> LongTensor:
        """Return segments at random offsets in the token stream of the calibration part.

        Args:
            tokenizer: turns the text into ids.
            num_segments: N, at least 1.
            segment_tokens: T, at least 1.
            seed: the same seed gives the same segments.

        Returns:
            Token ids, (N, T).

        Raises:
            InputError: the text is missing, not UTF-8 or shorter than one segment, or a number is below 1.
        """
        check_count("num_segments", num_segments)
        stream = self._tokenize(tokenizer, "calibration", segment_tokens)
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(stream) - segment_tokens + 1, (num_segments, 1), generator=generator)
        return stream[starts + torch.arange(segment_tokens)]

    def held_out(self, tokenizer: Tokenizer, segment_tokens: int, stride: int) -> HeldOut:
        """Return the test part, tokenized as one text and cut into segments; what does not fill one is dropped.

        Args:
            tokenizer: turns the text into ids.
            segment_tokens: T, at least 1.
            stride: from the start of a segment to the start of the next, 1 to T; T: they do not overlap.

        Raises:
            InputError: the text is missing, not UTF-8 or shorter than one segment, or a number is out of range.
        """
        check_stride(stride, segment_tokens)
        stream = self._tokenize(tokenizer, "test", segment_tokens)
        num_bytes = len(self.text("test").encode())
        return HeldOut(
            stream.unfold(0, segment_tokens, stride), num_bytes / (len(stream) - count_special(tokenizer, stream))
        )

    def sha256(self, split: Split) -> str:
        """Return the hash of a part's text in UTF-8, in hexadecimal."""
        return hashlib.sha256(self.text(split).encode()).hexdigest()

    def _tokenize(self, tokenizer: Tokenizer, split: Split, segment_tokens: int) -> LongTensor:
        """Return the token ids of a part, (total tokens,), at least one segment of them."""
        check_count("segment_tokens", segment_tokens)
        # verbose=False: a text longer than the model's context is what we want here, not worth a warning.
        stream = torch.tensor(tokenizer(self.text(split), verbose=False)["input_ids"], dtype=torch.long)
        if len(stream) < segment_tokens:
            raise InputError(
                f"the {split} text of {self.name!r} has {len(stream)} tokens, less than one segment of {segment_tokens}"
            )
        return stream


@dataclass(frozen=True)
class TextFile(RunningText):
    """A local text file, the same for calibration and test. Line ends are read as Python does: all become `\\n`.

    Args:
        path: a file in UTF-8.
        name: how results call it.
    """

    path: str
    name: str = "text"

    def text(self, split: Split) -> str:
        """Return the whole file, whichever part is asked for."""
        return read_text(expanded(self.path))


@dataclass(frozen=True)
class Embedded(RunningText):
    """The texts that the package ships beside its model: neither was seen in training, and they share no file."""

    name: str = "embedded"

    def text(self, split: Split) -> str:
        """Return calibration.txt or test.txt."""
        return read_text(embedded_text_folder() / f"{split}.txt")


@dataclass(frozen=True)
class WikiText2(RunningText):
    """WikiText-2, raw form, its rows joined by a blank line as GPTQ and its successors do; train and test split.

    Args:
        data_dir: a local folder that holds `wikitext-2-raw-v1/train-00000-of-00001.parquet` and `test-...`, or the
            same files without their folder. None: the hub cache, then the hub (`Salesforce/wikitext`).
    """

    data_dir: str | None = None
    name: str = "wikitext2"

    def text(self, split: Split) -> str:
        """Return the train split for calibration, else the test split."""
        hub_split = "train" if split == "calibration" else "test"
        path = find_file("Salesforce/wikitext", f"wikitext-2-raw-v1/{hub_split}-00000-of-00001.parquet", self.data_dir)
        text = "\n\n".join(read_rows("parquet", path, ["text"])["text"])
        # The other form has the same file names. Its perplexities are lower and compare with nobody's.
        if text.count("<unk>") * 10_000 > len(text):
            raise InputError(f"{path} is the tokenized form of WikiText-2, full of <unk>; give wikitext-2-raw-v1")
        return text


@dataclass(frozen=True)
class C4:
    """C4 as GPTQ samples it: each segment lies inside one random document that is longer than the segment.

    Args:
        data_dir: a local folder that holds `en/c4-train.00000-of-01024.json.gz` and
            `en/c4-validation.00000-of-00008.json.gz`, or the same files without their folder. None: the hub cache,
            then the hub (`allenai/c4`).
    """

    data_dir: str | None = None
    name: str = "c4"

    def random_segments(self, tokenizer: Tokenizer, num_segments: int, segment_tokens: int, seed: int) -> LongTensor:
        """Return segments of random documents of the first training file, at random offsets.

        Args and Returns: as of `RunningText.random_segments`.

        Raises:
            InputError: a file is missing or corrupt, no document is longer than a segment, or a number is below 1.
        """
        return self._draw("calibration", tokenizer, num_segments, segment_tokens, seed)

    def held_out(self, tokenizer: Tokenizer, segment_tokens: int, stride: int) -> HeldOut:
        """Return 256 segments of random documents of the first validation file; always the same ones.

        Args: as of `RunningText.held_out`, but only T is a `stride`: no segment goes on where another ends.

        Raises:
            InputError: a file is missing or corrupt, no document is longer than a segment, or a number is below 1.
        """
        check_stride(stride, segment_tokens)
        if stride != segment_tokens:
            raise InputError(f"evaluation.stride must be null with c4, which is no running text, got {stride}")
        segments = self._draw("test", tokenizer, C4_TEST_SEGMENTS, segment_tokens, seed=0)
        num_bytes = sum(len(text.encode()) for text in tokenizer.batch_decode(segments, skip_special_tokens=True))
        return HeldOut(segments, num_bytes / (segments.numel() - count_special(tokenizer, segments)))

    def sha256(self, split: Split) -> str:
        """Return the hash of a part's documents in UTF-8, each followed by a line end, in hexadecimal."""
        digest = hashlib.sha256()
        for document in self._documents(split):
            digest.update(document.encode() + b"\n")
        return digest.hexdigest()

    def _documents(self, split: Split) -> Sequence[str]:
        """Return the documents of a part."""
        shard = "train.00000-of-01024" if split == "calibration" else "validation.00000-of-00008"
        return read_rows("json", find_file("allenai/c4", f"en/c4-{shard}.json.gz", self.data_dir), ["text"])["text"]

    def _draw(
        self, split: Split, tokenizer: Tokenizer, num_segments: int, segment_tokens: int, seed: int
    ) -> LongTensor:
        """Return segments, (N, T), by the draws of GPTQ: a document until one is long enough, then an offset in it."""
        check_count("num_segments", num_segments)
        check_count("segment_tokens", segment_tokens)
        documents = self._documents(split)
        generator = random.Random(seed)
        segments, too_short = [], set()
        while len(segments) < num_segments and len(too_short) < len(documents):
            index = generator.randint(0, len(documents) - 1)
            if index in too_short:  # known from an earlier draw: not worth tokenizing again
                continue
            ids = tokenizer(documents[index], verbose=False)["input_ids"]
            if len(ids) <= segment_tokens:
                too_short.add(index)
                continue
            start = generator.randint(0, len(ids) - segment_tokens - 1)
            segments.append(ids[start : start + segment_tokens])
        if len(segments) < num_segments:
            raise InputError(
                f"none of the {len(documents)} {split} documents of 'c4' is longer than a segment of {segment_tokens}"
            )
        return torch.tensor(segments, dtype=torch.long)


# The corpora that an evaluation can name; each takes the local folder, or None.
CORPORA: dict[str, Callable[[str | None], Corpus]] = {
    "embedded": lambda data_dir: Embedded(),
    "wikitext2": WikiText2,
    "c4": C4,
}


def check_count(name: str, value: int) -> None:
    """Refuse a number that is not an integer of at least 1.

    Raises:
        InputError: it is not.

    Example:
        >>> check_count("num_segments", 128)
        >>> check_count("num_segments", 0)
        Traceback (most recent call last):
        cbq.errors.InputError: num_segments must be an integer of at least 1, got 0
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {value!r}")


def check_stride(stride: int, segment_tokens: int) -> None:
    """Refuse a stride that is no count, or leaves tokens out.

    Raises:
        InputError: it does.
    """
    check_count("segment_tokens", segment_tokens)
    check_count("evaluation.stride", stride)
    if stride > segment_tokens:
        raise InputError(f"evaluation.stride must be at most {segment_tokens}, the length of a segment, got {stride}")


def count_special(tokenizer: Tokenizer, ids: LongTensor) -> int:
    """Return how many token ids stand for no text: a start of text that the tokenizer adds."""
    special = torch.tensor(tokenizer.all_special_ids, dtype=torch.long)
    return int(torch.isin(ids, special).sum())


def embedded_text_folder() -> Path:
    """Return the folder of the package's own texts."""
    return Path(__file__).resolve().parents[1] / "pico"
