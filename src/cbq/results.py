"""`results.json`: the outcome of one run in a public format, described by `results.schema.json` beside this file.

A field is added, never renamed. A number that is not finite (the perplexity of a model that broke) is written as null:
JSON has no infinity, and a file that only Python can read is not public.
"""

import json
import math
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cbq
from cbq.devices import num_cores
from cbq.durable import write_text
from cbq.errors import InputError

FORMAT_VERSION = 1
RESULTS_NAME = "results.json"
SCHEMA_PATH = Path(__file__).with_name("results.schema.json")


def versions() -> dict[str, str]:
    """Return the versions of what computes results."""
    # Not `transformers.__version__`: only cbq.models imports transformers.
    return {"cbq": cbq.__version__} | {name: version(name) for name in ("torch", "transformers", "lightning")}


def environment(device: str) -> dict:
    """Describe the software and the machine of a run.

    Args:
        device: The torch device that the run computes on, such as "cpu" or "cuda".
    """
    return {
        "cbq": cbq.__version__,
        "git_commit": _git_commit(Path(cbq.__file__).resolve().parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        # Not `transformers.__version__`: only cbq.models imports transformers.
        "transformers": version("transformers"),
        "lightning": version("lightning"),
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "cores": num_cores(),
        "platform": platform.platform(),
    }


def failure(error: BaseException) -> str:
    """Return the kind and message of what ended a run, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def write_results(folder: Path, results: dict) -> None:
    """Write `<folder>/results.json` in one piece: a reader, or a crash, sees the old file or the new one.

    Args:
        folder: The run folder; made when missing.
        results: Plain Python values under the keys of the schema. "format_version" is added.
    """
    write_json(folder / RESULTS_NAME, results)


def write_json(path: Path, results: dict) -> None:
    """Write a file of results in one piece, as `write_results` does.

    Args:
        path: Its folder is made when missing.
        results: Plain Python values. "format_version" is added.
    """
    assert results.get("format_version", FORMAT_VERSION) == FORMAT_VERSION, "this code writes one format only"
    text = json.dumps(
        _null_unless_finite({"format_version": FORMAT_VERSION, **results}),
        indent=1,
        ensure_ascii=False,
        allow_nan=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")


def read_results(folder: Path) -> dict | None:
    """Read `<folder>/results.json`.

    Args:
        folder: A run folder.

    Returns:
        The results, or None when there are none. A number that was not finite is None.

    Raises:
        InputError: The file cannot be read, is not a JSON object, or has another format version.
    """
    path = folder / RESULTS_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text") from error
    try:
        results = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(results, dict):
        raise InputError(f"{path} must hold a JSON object, not a {type(results).__name__}")
    found = results.get("format_version")
    if found != FORMAT_VERSION:
        raise InputError(f"{path} has format_version {found!r}; this cbq reads {FORMAT_VERSION}")
    return results


def _null_unless_finite(value: Any) -> Any:
    """Copy a JSON value with None for every NaN and infinity."""
    if isinstance(value, dict):
        return {key: _null_unless_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_null_unless_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _git_commit(package: Path) -> str | None:
    """Return the commit of the cbq checkout that a package folder lies in, with "-dirty" after local changes.

    None for an installed package, also when it is installed somewhere inside another project's checkout.
    """
    root = package.parents[1]
    if not (root / ".git").exists() or root / "src" / "cbq" != package:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
