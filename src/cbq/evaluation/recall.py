"""What was computed before and would come out the same: a file a result, shared by the runs of a sweep."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbq.hashes import hash_tensors


class Recall:
    """Remembers results on disk under the hash of everything that decides them.

    Args:
        folder: made when the first result is written. None: remembers nothing.
        context: what decides every result: the model, the machine, the versions.

    Attributes:
        num_recalled: results that were not computed again.
    """

    def __init__(self, folder: Path | None, context: Iterable[str] = ()) -> None:
        self.folder = folder
        self.context = tuple(context)
        self.num_recalled = 0

    def __call__(self, key: Iterable[str], compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned for this key before, or else returns now.

        Args:
            key: what decides the result besides the context.
            compute: returns something of JSON's types.
        """
        if self.folder is None:
            return compute()
        parts = [*self.context, *key]
        path = self.folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == parts:
                self.num_recalled += 1
                return stored["result"]
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one: compute it again
            pass
        result = compute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps({"key": parts, "result": result}), encoding="utf-8")
            os.replace(temporary, path)
        except OSError:  # a full disk, or a home folder that cannot be written to: it is only slower
            pass
        return result


def fingerprint(model: nn.Module) -> str:
    """Return the hash of a model's configuration, parameters and buffers.

    Args:
        model: a transformers model.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    text = json.dumps(config, sort_keys=True, default=str) + hash_tensors(model.state_dict())
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tokens(ids: Sequence[torch.Tensor]) -> str:
    """Return the hash of some tensors of token ids, and of their order."""
    return hash_tensors({str(index): part.long() for index, part in enumerate(ids)})
