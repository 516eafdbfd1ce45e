"""cbq: cross-block quantization of large language models."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbq.api import quantize
    from cbq.checkpoint import load_checkpoint as load
    from cbq.checkpoint import save_checkpoint as save

__version__ = "0.1.0"
__all__ = ["load", "quantize", "save"]

FUNCTIONS = {
    "load": "cbq.checkpoint:load_checkpoint",
    "quantize": "cbq.api:quantize",
    "save": "cbq.checkpoint:save_checkpoint",
}


def __getattr__(name: str) -> object:
    """Return a function of the Python API; torch and transformers load only when one is used."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, function = FUNCTIONS[name].split(":")
    return getattr(import_module(module), function)
