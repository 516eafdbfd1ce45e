"""The texts: embedded, a local file, WikiText-2 and C4, cut into segments of token ids. The only door to datasets.

Shapes: N segments, T tokens.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import datasets
import torch
from torch import LongTensor

from cbq.errors import InputError, check_text
from cbq.hub import fetch_file

Split = Literal["calibration", "test"]
# Any callable with the interface of a transformers tokenizer: `tokenizer(text, verbose=False)["input_ids"]`.
Tokenizer = Callable[..., Any]

# The field's protocol for C4: so many segments of the validation documents, drawn with Python's generator and seed 0.
C4_TEST_SEGMENTS = 256


class Corpus(Protocol):
    """A text with a part to calibrate on and a part to test on."""

    name: str

    def random_segments(self, tokenizer: Tokenizer, num_segments: int, segment_tokens: int, seed: int) -> LongTensor:
        """Return `num_segments` random segments of the calibration part, (N, T)."""
        ...

    def test_segments(self, tokenizer: Tokenizer, segment_tokens: int) -> LongTensor:
        """Return the segments of the test part, (N, T)."""
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

    def test_segments(self, tokenizer: Tokenizer, segment_tokens: int) -> LongTensor:
        """Return the test part, tokenized as one text, cut into segments that do not overlap; the tail is dropped.

        Args:
            tokenizer: turns the text into ids.
            segment_tokens: T, at least 1.

        Returns:
            Token ids, (N, T).

        Raises:
            InputError: the text is missing, not UTF-8 or shorter than one segment, or `segment_tokens` is below 1.
        """
        stream = self._tokenize(tokenizer, "test", segment_tokens)
        return stream[: len(stream) // segment_tokens * segment_tokens].view(-1, segment_tokens)

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
        return _read_text(Path(self.path).expanduser())


@dataclass(frozen=True)
class Embedded(RunningText):
    """The texts that the package ships beside its model: neither was seen in training, and they share no file."""

    name: str = "embedded"

    def text(self, split: Split) -> str:
        """Return calibration.txt or test.txt."""
        return _read_text(embedded_text_folder() / f"{split}.txt")


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
        path = _find_file("Salesforce/wikitext", f"wikitext-2-raw-v1/{hub_split}-00000-of-00001.parquet", self.data_dir)
        text = "\n\n".join(_read_documents("parquet", path))
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

    def test_segments(self, tokenizer: Tokenizer, segment_tokens: int) -> LongTensor:
        """Return 256 segments of random documents of the first validation file; always the same ones.

        Args and Returns: as of `RunningText.test_segments`.

        Raises:
            InputError: a file is missing or corrupt, no document is longer than a segment, or a number is below 1.
        """
        return self._draw("test", tokenizer, C4_TEST_SEGMENTS, segment_tokens, seed=0)

    def sha256(self, split: Split) -> str:
        """Return the hash of a part's documents in UTF-8, each followed by a line end, in hexadecimal."""
        digest = hashlib.sha256()
        for document in self._documents(split):
            digest.update(document.encode() + b"\n")
        return digest.hexdigest()

    def _documents(self, split: Split) -> Sequence[str]:
        """Return the documents of a part."""
        shard = "train.00000-of-01024" if split == "calibration" else "validation.00000-of-00008"
        return _read_documents("json", _find_file("allenai/c4", f"en/c4-{shard}.json.gz", self.data_dir))

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


def embedded_text_folder() -> Path:
    """Return the folder of the package's own texts."""
    return Path(__file__).resolve().parents[1] / "pico"


def _read_text(path: Path) -> str:
    """Read a text file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"text file {path} cannot be read: {error.strerror}") from error


def _find_file(repo_id: str, filename: str, data_dir: str | None) -> Path:
    """Return the local path of a dataset's file: in the local folder if one is given, else in the hub cache."""
    check_text("data_dir", data_dir, optional=True)
    if data_dir is None:
        return fetch_file(repo_id, filename)
    folder = Path(data_dir).expanduser()
    for path in (folder / filename, folder / Path(filename).name):
        if path.is_file():
            return path
    raise InputError(f"data_dir {data_dir!r} holds neither {filename} nor {Path(filename).name} (of {repo_id})")


def _read_documents(kind: Literal["parquet", "json"], path: Path) -> Sequence[str]:
    """Return the `text` column of a file; datasets keeps it on disk, memory-mapped, and reads what is indexed."""
    bars, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the errors that it also raises
    try:
        # Not load_dataset: even for a local file it reports its use to a server, with retries when there is no network.
        read = datasets.Dataset.from_parquet if kind == "parquet" else datasets.Dataset.from_json
        return read(str(path)).select_columns("text")["text"]
    except (datasets.exceptions.DatasetsError, OSError, ValueError, EOFError, StopIteration) as error:
        raise InputError(f"{path} is not a {kind} file with a column `text`, or is corrupt") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
