"""Whether a run came out again as it did: figure by figure, and bit by bit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from cbq.errors import InputError
from cbq.hashes import hash_tensors

NOT_COMPARED = {"wall_time_seconds", "revision"}  # the hash of the weights is compared
MEASURED = ("protocol", "fingerprint", "perplexity", "bits_per_byte", "zero_shot", "agreement", "windows")
WEIGHTS = ("*.safetensors", "cbq/*.safetensors")


@dataclass(frozen=True)
class Figure:
    """One figure of two runs.

    Args:
        name: by its dotted key in `results.json`, or the file of a checkpoint.
        then: in the first run; None: it has none.
        now: in the second.
    """

    name: str
    then: Any
    now: Any

    @property
    def same(self) -> bool:
        """Whether it is the same to the bit."""
        return self.then == self.now


def figures(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Figure]:
    """Return every figure that does not depend on the time that a run took, or on where its model came from.

    Args:
        then: what `results.json` of a finished run holds.
        now: of another.

    Example:
        >>> figures({"effective_bits": 2.0, "cost": {}}, {"effective_bits": 2.5, "cost": {}})
        [Figure(name='effective_bits', then=2.0, now=2.5)]
    """
    pairs = [flat({key: run[key] for key in (*MEASURED, "effective_bits") if key in run}) for run in (then, now)]
    names = dict.fromkeys([*pairs[0], *pairs[1]])
    return [Figure(name, pairs[0].get(name), pairs[1].get(name)) for name in names]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return every number and text inside a value of JSON's types by its dotted key.

    Example:
        >>> flat({"windows": [{"start": 0, "wall_time_seconds": 1.5}]})
        {'windows.0.start': 0}
        >>> flat({"fingerprint": {"model": "5f2c", "revision": "4782"}})
        {'fingerprint.model': '5f2c'}
    """
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key not in NOT_COMPARED]
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flat(item, f"{name}.{key}" if name else str(key))
    return found


def weights(then: Path, now: Path) -> list[Figure]:
    """Return the hash of the tensors of each file of weights in two checkpoints."""
    found = [path.relative_to(folder) for folder in (then, now) for glob in WEIGHTS for path in folder.glob(glob)]
    names = sorted(map(str, set(found)))
    return [Figure(f"checkpoint/{name}", hash_of(then / name), hash_of(now / name)) for name in names]


def hash_of(path: Path) -> str | None:
    """Return the hash of a file's tensors, or None where there is no such file.

    Raises:
        InputError: it is damaged.
    """
    try:
        return hash_tensors(load_file(path)) if path.is_file() else None
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
