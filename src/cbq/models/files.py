"""The files of a model folder: which there are, and which are missing or broken. No weight is read into memory."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from cbq.errors import InputError
from cbq.hub import first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# No leading star before `.safetensors`: some repositories hold every weight a second time in another layout.
HUB_PATTERNS = ("*.json", "model*.safetensors", "tokenizer*", "*.model", "merges.txt", "*.jinja")


def check_safetensors(file: Path) -> None:
    """Refuse a file that is no safetensors file.

    Raises:
        InputError: it is not.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a safetensors file, or a truncated one: {first_line(error)}") from error


def check_pickle(file: Path) -> None:
    """Refuse a file that holds anything but tensors, none of whose code is run.

    Raises:
        InputError: it does, or is broken.
    """
    try:
        torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise InputError(f"{file} holds more than tensors, or is broken: {type(error).__name__}") from error


@dataclass(frozen=True)
class WeightFormat:
    """How a folder holds its weights.

    Args:
        single: the name of the one file.
        index: the name of the list of several.
        pattern: of all files.
        check: raises InputError for a broken file.
    """

    single: str
    index: str
    pattern: str
    check: Callable[[Path], None]


SAFETENSORS = WeightFormat("model.safetensors", "model.safetensors.index.json", "model*.safetensors", check_safetensors)
PICKLE = WeightFormat("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin", check_pickle)


def weight_format(folder: Path) -> WeightFormat | None:
    """Return how a folder holds its weights, safetensors if there are both, or None if there are no weights."""
    for found in (SAFETENSORS, PICKLE):
        if (folder / found.single).is_file() or (folder / found.index).is_file():
            return found
    return None


def find_defect(folder: Path) -> str | None:
    """Return what a model folder lacks, or None: the files themselves, not yet their content."""
    if not (folder / "config.json").is_file():
        return "has no config.json"
    found = weight_format(folder)
    if found is None:
        return f"has no {SAFETENSORS.single} (and no {SAFETENSORS.index}), and no {PICKLE.single} either"
    if (folder / found.index).is_file():
        try:
            shards = set(json.loads((folder / found.index).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"has a corrupt {found.index}"
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            return f"lacks {', '.join(missing)}, which {found.index} names"
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return f"has no tokenizer ({', '.join(TOKENIZER_FILES)})"
    return None
