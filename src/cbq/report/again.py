"""The command that makes a run again."""

import shlex
from collections.abc import Mapping


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
    environment = results["environment"]
    commit = environment["git_commit"] or ""
    first = f"git checkout {commit.removesuffix('-dirty')}" if commit else f"pip install cbq=={environment['cbq']}"
    if commit.endswith("-dirty"):
        first += "  # and the changes that were not committed"
    if "overrides" not in results:
        return f"{first}\n# what was typed is not recorded: its options are below"
    return f"{first}\n" + " \\\n  ".join(["python run.py", *map(shlex.quote, results["overrides"])])
