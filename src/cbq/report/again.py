"""The command that makes a run again."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any


def reproduce(results: Mapping) -> str:
    """Return the commands that make the same run, every option written out; other machines may round otherwise."""
    environment = results["environment"]
    commit = environment["git_commit"] or ""
    first = f"git checkout {commit.removesuffix('-dirty')}" if commit else f"pip install cbq=={environment['cbq']}"
    if commit.endswith("-dirty"):
        first += "  # and the changes that were not committed"
    choices = [word(key, value) for key, value in results["settings"].items() if "." not in key and key != "name"]
    options = [word(key, value) for key, value in results["settings"].items() if "." in key and value is not None]
    return " \\\n  ".join([f"{first}\npython run.py {' '.join(choices)}", *options])


def word(key: str, value: Any) -> str:
    """Return an option as a shell's word that hydra reads.

    Example:
        >>> print(word("evaluation.corpora", ["c4", "embedded"]), word("cbd.overlap", None), word("a.b", True))
        'evaluation.corpora=[c4,embedded]' cbd.overlap=null a.b=true
    """
    return shlex.quote(f"{key}={plain(value)}")


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
