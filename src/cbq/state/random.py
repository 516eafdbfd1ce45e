"""The states of every random generator that a run draws from."""

import random
from typing import Any

import numpy as np
import torch


def random_states() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the states: torch's as tensors of bytes, Python's and numpy's as values of JSON's types."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda-{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": [version, list(words), gauss], "numpy": [kind, keys.tolist(), *rest]}


def set_random_states(tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Put back what `random_states` returned; the states of devices that are not there are left out."""
    torch.set_rng_state(tensors["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda-{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda-{index}"], index)
    version, words, gauss = facts["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
