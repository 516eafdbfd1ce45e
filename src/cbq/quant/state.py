"""What quantized modules compute with: full precision is a state of a module, not a second copy of the model."""

from contextlib import AbstractContextManager
from enum import Enum

from torch import nn

from cbq.attributes import temporarily


class QuantState(Enum):
    """What a `Quantized` module computes with."""

    FULL_PRECISION = "full precision"
    NEAREST = "round to nearest"
    LEARNED = "learned"


class Quantized(nn.Module):
    """A module that can be quantized.

    Attributes:
        state: what it computes with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.state = QuantState.FULL_PRECISION


def quantized_modules(modules: nn.Module | list[nn.Module]) -> list[Quantized]:
    """Return every `Quantized` module in or below `modules`, in order."""
    modules = [modules] if isinstance(modules, nn.Module) else modules
    return [child for module in modules for child in module.modules() if isinstance(child, Quantized)]


def quant_state(modules: nn.Module | list[nn.Module], state: QuantState) -> AbstractContextManager[None]:
    """Put every `Quantized` module in or below `modules` into `state`, and back at the end."""
    return temporarily(quantized_modules(modules), "state", state)
