"""The files of a model folder: which there are, and which are missing or broken. No weight is read into memory."""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open

from cbq.errors import InputError, is_folder, one_line

SHARD_SIZE = "5GB"  # of the largest file of weights that is written
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# No leading star before `.safetensors`: some repositories hold every weight a second time in another layout.
HUB_PATTERNS = ("*.json", "model*.safetensors", "tokenizer*", "*.model", "merges.txt", "*.jinja")
READ_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".jsonl")  # by transformers, by their ends
# What changes the model where it is there: without it transformers makes do with something else.
NEEDED_FILES = (
    *("config.json", "generation_config.json", "model*.safetensors*", "pytorch_model*.bin*", "adapter_*"),
    *("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*",),
)
FLOATS = ("F64", "F32", "F16", "BF16")
PICKLED_DTYPES = dict(zip((torch.float64, torch.float32, torch.float16, torch.bfloat16), FLOATS, strict=True))
# In config.json: which file of the folder has the quantization of activations, without which it is another model.
ACTIVATIONS_KEY = "cbq_activations"
# How families call the number of their blocks in config.json.
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def safetensors_dtypes(file: Path) -> dict[str, str]:
    """Return the types of a safetensors file's tensors by name, as safetensors calls them.

    Raises:
        InputError: it is no such file.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a safetensors file, or a truncated one: {one_line(error)}") from error


def pickle_dtypes(file: Path) -> dict[str, str]:
    """Return the types of a pickle's tensors by name, as safetensors calls them; none of its code is run.

    Raises:
        InputError: it holds anything but tensors, or is broken.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are refused
            found = torch.load(file, map_location="meta", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{file} holds more than tensors, or is broken: {type(error).__name__}") from error
    if not isinstance(found, dict) or not all(isinstance(each, torch.Tensor) for each in found.values()):
        raise InputError(f"{file} holds more than tensors by their names")
    return {name: PICKLED_DTYPES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in found.items()}


@dataclass(frozen=True)
class WeightFormat:
    """How a folder holds its weights.

    Args:
        single: the name of the one file.
        index: the name of the list of several.
        pattern: of all files, on the hub.
        dtypes: returns the types of a file's tensors by name; raises InputError for a broken one.
    """

    single: str
    index: str
    pattern: str
    dtypes: Callable[[Path], dict[str, str]]

    def shards(self, folder: Path) -> list[str]:
        """Return the names of the files in a folder that hold its weights, in order.

        Raises:
            ValueError: the index is corrupt, or names what is no file of the folder.
        """
        if (folder / self.single).is_file():  # what transformers reads then, whatever the index says
            return [self.single]
        content = read_json(folder / self.index)
        names = content.get("weight_map") if isinstance(content.get("metadata", {}), dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"has a corrupt {self.index}")
        for name in sorted(set(names.values())):
            # An index of somebody else's must not reach outside.
            if name != Path(name).name or Path(name).suffix != Path(self.single).suffix or "\0" in name:
                raise ValueError(f"has a corrupt {self.index}: {name[:80]!r} is the name of no weight file")
        return sorted(set(names.values()))


SAFETENSORS = WeightFormat(
    "model.safetensors", "model.safetensors.index.json", "model*.safetensors", safetensors_dtypes
)
PICKLE = WeightFormat("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin", pickle_dtypes)


def read_json(file: Path) -> dict:
    """Return the object of a JSON file.

    Raises:
        ValueError: it holds none, or cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"has a corrupt {file.name}: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"has a corrupt {file.name}: it holds no object")
    return content


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
    try:
        missing = [shard for shard in found.shards(folder) if not is_file(folder / shard)]
    except ValueError as error:
        return str(error)
    if missing:
        return f"lacks {', '.join(missing)[:200]}, which {found.index} names"
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return f"has no tokenizer ({', '.join(TOKENIZER_FILES)})"
    return None


def is_file(path: Path) -> bool:
    """Return whether there is such a file; a name that no file system takes is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def find_trap(folder: Path) -> str | None:
    """Return what is in a folder that a reader would wait for, read for ever, or take for missing; or None.

    Links to files are followed: the hub's cache is made of them, and where a download was cut short some lead nowhere.
    """
    for path in sorted(folder.iterdir()):
        needed = any(fnmatch(path.name, pattern) for pattern in NEEDED_FILES)
        special = path.suffix in READ_FILES and os.path.exists(path)  # Path's own raises where it may not look
        if (special or needed) and not is_file(path) and not is_folder(path):
            return f"holds {path.name}, which is neither a file nor a folder"
    return None


def check_weights(folder: Path, full_precision: bool) -> int:
    """Return the number of bytes that hold a folder's weights, each file of which can be read.

    Args:
        folder: has a config.json, and weights.
        full_precision: they must be floating-point numbers; transformers would take integers or 8 bits for such.

    Raises:
        InputError: a file is broken, or of another type, or config.json says that there are more blocks than tensors:
            transformers would begin to build them.
    """
    weights = weight_format(folder)
    try:
        files = [folder / shard for shard in weights.shards(folder)]
        config = read_json(folder / "config.json")
    except ValueError as error:
        raise InputError(f"model folder {folder} {error}") from None
    dtypes: dict[str, str] = {}
    for file in files:
        dtypes |= weights.dtypes(file)
    for key in BLOCK_COUNTS:
        if isinstance(config.get(key), int) and config[key] > len(dtypes):
            said = f"{key}={config[key]:.4g}" if config[key] < 10**15 else f"an absurd {key}"
            raise InputError(
                f"{folder}/config.json says {said}, and the files of its weights hold {len(dtypes)} tensors"
            )
    for name, dtype in dtypes.items():
        if full_precision and name.endswith("weight") and dtype not in FLOATS:
            raise InputError(
                f"the checkpoint in {folder} holds {name} as {dtype}; it must be one of {', '.join(FLOATS)}"
            )
    return sum(file.stat().st_size for file in files)
