"""`resume=<run folder>`: the command line that a run was started with, typed again."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from cbq.cli.options import quote
from cbq.errors import InputError, expanded
from cbq.results import read_results

KEY = "resume="


def resumed(words: list[str]) -> list[str]:
    """Return the command line with `resume=<folder>` replaced by what started the run in that folder.

    Relative paths begin where it was started: the working folder becomes that one, if it is still there.

    Args:
        words: the command line; what else it holds comes last.

    Raises:
        InputError: the folder holds no run, or one whose command line names code to run.
    """
    given = [word.removeprefix(KEY) for word in words if word.startswith(KEY)]
    if not given:
        return words
    rest = [word for word in words if not word.startswith(KEY)]
    if len(given) > 1 or not given[0] or {"-m", "--multirun"} & set(rest):
        raise InputError("resume must be one run folder; a sweep goes on when it is started again")
    folder = expanded(given[0]).resolve()
    typed, working_folder = command_of(folder)
    if working_folder.is_dir():
        os.chdir(working_folder)
    return [*typed, f"hydra.run.dir={quote(str(folder))}", *rest]


def command_of(folder: Path) -> tuple[list[str], Path]:
    """Return what was typed to start the run in a folder, and where.

    Raises:
        InputError: the folder holds no run, or one whose command line names code to run.
    """
    results = read_results(folder) if folder.is_dir() else None
    if results is None:
        raise InputError(f"{folder} holds no run of cbq")
    typed, working_folder = results.get("overrides"), results.get("working_folder")
    if not isinstance(typed, list) or not all(isinstance(word, str) for word in typed):
        raise InputError(f"{folder} does not say what was typed: its run is older than resume= and reproduce")
    if not isinstance(working_folder, str) or not Path(working_folder).is_absolute():
        raise InputError(f"{folder} does not say where it was typed: its run is older than resume= and reproduce")
    for word in typed:
        # Whoever was sent a folder shall not run what its sender likes, nor send it what the environment holds.
        if names_code(word):
            raise InputError(f"{folder} names code or hydra options to run ({word}): type its command line yourself")
    return typed, Path(working_folder)


def names_code(word: str) -> bool:
    """Return whether a word of a command line may do more than choose among our options.

    Example:
        >>> [names_code(word) for word in ("quant=w4a4", "x={_target_: torch.load}", "a=${oc.env:HOME}", "--cfg=job")]
        [False, True, True, True]
    """
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except HydraException:
        return True
    keys = {override.key_or_group, *keys_below(override.value())}
    words = [part for key in keys for part in re.split(r"[./@]", str(key))]
    return "${" in word or not {"_target_", "trust_remote_code", "hydra"}.isdisjoint(words)


def keys_below(value: object) -> Iterator[str]:
    """Yield every key in the dicts below a value of an override."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from keys_below(item)
    elif isinstance(value, list):
        for item in value:
            yield from keys_below(item)
