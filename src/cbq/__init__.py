"""cbq: cross-block quantization of large language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from cbq.models.loading import LoadedModel

__version__ = "0.1.0"


def load(folder: "str | Path") -> "LoadedModel":
    """Return the quantized model of a run's `checkpoint/` folder: see `cbq.checkpoint.load_checkpoint`."""
    from cbq.checkpoint import load_checkpoint  # torch and transformers load only when they are needed

    return load_checkpoint(folder)
