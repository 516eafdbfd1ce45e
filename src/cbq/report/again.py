"""The commands that make a run, or the runs of a sweep, again."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any


def reproduce(results: Mapping) -> str:
    """Return the commands that make the same run: its code, and what was typed; other machines may round otherwise.

    Args:
        results: what `results.json` of the run holds.

    Example:
        >>> typed = ["quant=w4a4", "evaluation.corpora=[c4,embedded]"]
        >>> print(reproduce({"environment": {"git_commit": "5f2c", "cbq": "0.1"}, "overrides": typed}))
        git checkout 5f2c
        python run.py \\
          quant=w4a4 \\
          'evaluation.corpora=[c4,embedded]'
    """
    first = checkout(results["environment"])
    if "overrides" not in results:
        return f"{first}\n# what was typed is not recorded: its options are below"
    return f"{first}\n" + " \\\n  ".join(["python run.py", *map(shlex.quote, results["overrides"])])


def checkout(environment: Mapping) -> str:
    """Return the command that gets the program that a run was made by."""
    commit = environment["git_commit"] or ""
    first = f"git checkout {commit.removesuffix('-dirty')}" if commit else f"pip install cbq=={environment['cbq']}"
    return f"{first}  # and the changes that were not committed" if commit.endswith("-dirty") else first


def sweep_again(runs: Sequence[Mapping], folder: Path) -> str:
    """Return the commands that make the runs of a sweep again, in its folder, and its report.

    Cells that are finished there are skipped. Empty where no run says what was typed.

    Args:
        runs: contents of `results.json`.
        folder: of the sweep; written down from where the runs were started, if it is below.
    """
    known = [run for run in runs if "overrides" in run and "working_folder" in run]
    if not known:
        return ""
    homes = {run["working_folder"] for run in known}
    folder = folder.resolve()
    home = homes.pop()
    place = str(folder.relative_to(home)) if not homes and folder.is_relative_to(home) else str(folder)
    lines = [f"# {len(runs) - len(known)} runs do not say what was typed"] if len(known) < len(runs) else []
    for first in dict.fromkeys(checkout(run["environment"]) for run in known):
        jobs = [run["overrides"] for run in known if checkout(run["environment"]) == first]
        lines.append(first)
        for words in sweeps([{each.partition("=")[0]: each for each in job} for job in jobs]):
            lines.append(shlex.join(["python", "run.py", "-m", *words]) + " " + text_option("hydra.sweep.dir", place))
    return "\n".join([*lines, shlex.join(["python", "run.py", "report", place])])


def sweeps(jobs: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Return the words of sweeps that together make some jobs and no others.

    Args:
        jobs: key -> word on the command line.

    Example:
        >>> sweeps([{"a": "a=1", "seed": "seed=0"}, {"a": "a=1", "seed": "seed=1"}, {"seed": "seed=0"}])
        [['a=1', 'seed=0,1'], ['seed=0']]
        >>> sweeps([{"a": "a=1", "b": "b=1"}, {"a": "a=1", "b": "b=2"}, {"a": "a=2", "b": "b=2"}])
        [['a=1', 'b=1,2'], ['a=2', 'b=2']]
    """
    found = []
    for keys in dict.fromkeys(frozenset(job) for job in jobs):
        group = [job for job in jobs if job.keys() == keys]
        words = {key: list(dict.fromkeys(job[key] for job in group)) for key in group[0]}
        if prod(map(len, words.values())) == len({frozenset(job.values()) for job in group}):
            values = [[first, *(other.partition("=")[2] for other in others)] for first, *others in words.values()]
            found.append([",".join(each) for each in values])
            continue
        split = min((key for key in words if len(words[key]) > 1), key=lambda key: len(words[key]))
        for choice in words[split]:
            found += sweeps([job for job in group if job[split] == choice])
    return found


def text_option(key: str, text: str) -> str:
    """Return an option that is a text as a shell's word that hydra reads.

    Example:
        >>> print(text_option("hydra.sweep.dir", "multirun/table3c"), text_option("hydra.sweep.dir", "my runs"))
        hydra.sweep.dir=multirun/table3c "hydra.sweep.dir='my runs'"
    """
    word = f"{key}={plain(text)}"
    return f'"{word}"' if "'" in word and not set(word) & set('"\\$`!') else shlex.quote(word)


def plain(value: Any) -> str:
    """Return a value in hydra's grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{plain(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./-]+", value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)
