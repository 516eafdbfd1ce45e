"""A run that can be started often, killed, and compared with one that nothing happened to."""

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cbq
from cbq.report.reproduction import figures, weights
from cbq.results import read_results

SERVER = Path(__file__).with_name("run_server.py")


@dataclass
class Ended:
    """What became of one start.

    Args:
        code: its exit code; minus the signal that killed it.
        said: all that it printed.
        seconds: that it took.
    """

    code: int
    said: str
    seconds: float


class Starter:
    """Starts one experiment in any folder.

    Args:
        argv: its options.
        folder: for outputs.
    """

    def __init__(self, argv: list[str], folder: Path) -> None:
        self.argv = argv
        self.folder = folder
        self.number = 0
        source = str(Path(cbq.__file__).resolve().parents[1])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
        self.server = subprocess.Popen(
            [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(
        self,
        run: Path,
        *options: str,
        after: float | None = None,
        once: Path | None = None,
        number: int = signal.SIGKILL,
        die_at: int | None = None,
        resume: bool = False,
    ) -> Ended:
        """Run the experiment in a folder, to its end or to a signal.

        Args:
            run: the folder.
            options: added to the experiment's.
            after: seconds to a signal; None: none comes.
            once: a file that brings the signal as soon as it is there.
            number: of the signal.
            die_at: see `run_server.count_writes`; None: writes are not counted.
            resume: by `resume=<folder>`.
        """
        argv = [f"resume={run}"] if resume else [*self.argv, f"hydra.run.dir={run}"]
        return self.say(*argv, *options, after=after, once=once, number=number, die_at=die_at)

    def say(
        self,
        *argv: str,
        after: float | None = None,
        once: Path | None = None,
        number: int = signal.SIGKILL,
        die_at: int | None = None,
    ) -> Ended:
        """Run any command; see `start`."""
        self.number += 1
        output = self.folder / f"output{self.number}.txt"
        began = time.monotonic()
        self.server.stdin.write(json.dumps({"argv": argv, "output": str(output), "die_at": die_at}) + "\n")
        self.server.stdin.flush()
        process = int(self.server.stdout.readline())
        if after is not None or once is not None:
            end = math.inf if after is None else began + after
            while time.monotonic() < end and not (once and once.exists()):
                if select.select([self.server.stdout], [], [], min(0.005, max(0, end - time.monotonic())))[0]:
                    break  # it has ended
            with suppress(ProcessLookupError):  # it has ended
                os.kill(process, number)
        code = int(self.server.stdout.readline())
        return Ended(code, output.read_text(errors="replace") if output.exists() else "", time.monotonic() - began)


def assert_same(reference: Path, run: Path) -> None:
    """Every figure, every bit of the checkpoint, and every curve but times, are as in the reference."""
    found = figures(read_results(reference), read_results(run))
    found += weights(reference / "checkpoint", run / "checkpoint")
    assert len(found) > 40
    assert [figure for figure in found if not figure.same] == []
    assert not (run / "state").exists()


def one_line(ended: Ended) -> str:
    """Return the line that explains a mistake; there is no traceback."""
    assert "Traceback" not in ended.said, ended.said
    lines = [line for line in ended.said.splitlines() if line.startswith("cbq: ")]
    assert lines, ended.said
    return lines[-1]
