"""`cbq reproduce`: a finished run once more, and what came out otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console

import cbq
from cbq.cli.options import quote
from cbq.cli.resume import command_of
from cbq.errors import InputError, expanded
from cbq.report.reproduction import Figure, figures, weights
from cbq.results import environment, read_results

MANY = 12  # differing figures are not all shown
HARDWARE = ("device", "device_name", "cores", "platform")


class Reproduction:
    """Runs the command line of a finished run again, in a folder of its own, and compares.

    Args:
        folder: of the run.
        out: of the new one; `reproduced` in the run's if None. One that is there and finished is compared as it is.
    """

    def __init__(self, folder: str, out: str | None = None) -> None:
        for key, value in {"folder": folder, **({"out": out} if out is not None else {})}.items():
            if not isinstance(value, str) or not value:
                raise InputError(f"{key} must be a folder, got {value!r}")
        self.folder = expanded(folder).resolve()
        self.out = expanded(out).resolve() if out else self.folder / "reproduced"
        self.console = Console(highlight=False)

    def run(self) -> list[Figure]:
        """Run, compare, and say what differs.

        Returns:
            the figures that differ: none.

        Raises:
            InputError: there is no finished run, it does not run now, or something came out otherwise.
        """
        typed, working_folder = command_of(self.folder)
        then = read_results(self.folder)
        status = then.get("status")
        if status != "finished":
            raise InputError(f"the run in {self.folder} is {status}, not finished: cbq resume={self.folder}")
        if not working_folder.is_dir():
            raise InputError(f"the run in {self.folder} was started in {working_folder}, which is not there")
        self.say_environment(then.get("environment") or {})
        # An export beside its checkpoint, as all of the copy: where it was written then, there is one already.
        elsewhere = any(word.partition("=")[0].lstrip("+") == "export.out" for word in typed)
        own = [*(["export.out=null"] if elsewhere else []), f"hydra.run.dir={quote(str(self.out))}"]
        command = [sys.executable, "-m", "cbq", *typed, *own]
        package = Path(cbq.__file__).resolve().parents[1]
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        # Safe: where it was typed may be somebody else's folder, and hold modules of any name.
        safely = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        code = subprocess.run(command, cwd=working_folder, env=safely, check=False).returncode
        if code:
            raise InputError(f"the run in {self.folder} does not run again: it ended with code {code}")
        return self.compare(then)

    def say_environment(self, then: dict) -> None:
        """Say what of versions and hardware is not what it was."""
        now = environment("cuda" if torch.cuda.is_available() else "cpu")
        for key in ("cbq", "git_commit", "python", "torch", "transformers", "lightning", *HARDWARE):
            if then.get(key) != now[key]:
                self.console.print(f"{key} was {then.get(key)}, is {now[key]}", markup=False, soft_wrap=True)

    def compare(self, then: dict) -> list[Figure]:
        """Compare the finished runs, and say what came out."""
        now = read_results(self.out)
        if now is None:
            raise InputError(f"the run in {self.folder} does not run again: it left no results in {self.out}")
        found = figures(then, now) + weights(self.folder / "checkpoint", self.out / "checkpoint")
        differing = [figure for figure in found if not figure.same]
        for figure in differing[:MANY]:
            self.console.print(f"{figure.name}: {figure.then} then, {figure.now} now", markup=False, soft_wrap=True)
        if differing:
            raise InputError(f"not reproduced: {len(differing)} of {len(found)} figures and files differ")
        self.console.print(f"reproduced: all {len(found)} figures and files are the same to the bit")
        return differing
