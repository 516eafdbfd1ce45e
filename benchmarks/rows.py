"""What a benchmark reports: rows, and the JSON file that holds them.

The file is a public format: a field is added, never renamed.

    {"format_version": 1,
     "environment": {"git_commit": "...", "torch": "...", "device": "cpu", "threads": 2, "...": "..."},
     "command": "python -m benchmarks ...",
     "rows": [{"key": "step/window step / bare step/1b 1x512 W4A4 lora_ste", "part": "step", "name": "...",
               "case": "...", "unit": "ratio", "value": 1.9, "low": 1.8, "high": 2.0, "samples": [1.8, 1.9, 2.0],
               "expected": 1.5, "judged": true, "note": ""}],
     "skipped": [{"what": "...", "why": "..."}]}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cbq.errors import InputError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One number of the table: the median of its samples.

    Args:
        part: which benchmark it comes from.
        name: what is measured.
        case: on what: size, segments x tokens, scheme, rounding.
        samples: one value a repeat, each from one run of A and one of B right after it.
        unit: `ratio`, `exponent`, `share` or `minutes`.
        expected: the bar, or what theory says; None where there is neither.
        judged: whether a higher value is worse, so that `--compare` may mark it.
        note: what a reader must know.

    Example:
        >>> row = Row("step", "A / B", "pico", (1.0, 1.5, 1.25))
        >>> row.key, row.value, row.low, row.high
        ('step/A / B/pico', 1.25, 1.0, 1.5)
    """

    part: str
    name: str
    case: str
    samples: tuple[float, ...]
    unit: str = "ratio"
    expected: float | None = None
    judged: bool = True
    note: str = ""

    @property
    def key(self) -> str:
        """What a baseline's row is found by."""
        return f"{self.part}/{self.name}/{self.case}"

    @property
    def value(self) -> float:
        """The median of the samples."""
        return median(self.samples)

    @property
    def low(self) -> float:
        """The smallest sample."""
        return min(self.samples)

    @property
    def high(self) -> float:
        """The largest sample."""
        return max(self.samples)


@dataclass(frozen=True)
class Skipped:
    """Something that was not measured.

    Args:
        what: the rows that are missing.
        why: in one line.
    """

    what: str
    why: str


def to_json(rows: list[Row], skipped: list[Skipped], environment: dict, command: str) -> dict:
    """Return the content of the file."""
    return {
        "format_version": FORMAT_VERSION,
        "environment": environment,
        "command": command,
        "rows": [{"key": row.key, **vars(row), "value": row.value, "low": row.low, "high": row.high} for row in rows],
        "skipped": [vars(line) for line in skipped],
    }


def read_rows(path: Path) -> tuple[list[Row], dict]:
    """Return the rows and the environment of a file that an earlier run wrote.

    Raises:
        InputError: there is no such file, or it is none of ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"baseline {path} cannot be read: {' '.join(str(error).split())}") from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"baseline {path} has format_version {version!r}; these benchmarks read {FORMAT_VERSION}")
    fields = Row.__dataclass_fields__
    try:
        rows = [
            Row(**{name: row[name] for name in fields if name != "samples"}, samples=tuple(map(float, row["samples"])))
            for row in content["rows"]
        ]
        return rows, dict(content["environment"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"baseline {path} is damaged: {type(error).__name__} {error}") from None
