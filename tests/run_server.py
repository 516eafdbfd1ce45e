"""Runs `cbq` again and again in children of one process that has imported everything: a kill costs no import.

Orders come as lines of JSON on standard input: "argv", "output" (a file), and "die_at": the number of the write at
which the child kills itself. Answers are two lines: the child's process id, then its exit code.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import cbq.runner  # noqa: F401 - all that a run imports
from cbq.cli import main
from cbq.state import generations

torch.set_num_threads(1)


def count_writes(die_at: int, counted: Path) -> None:
    """Count what changes the disk, and end the process at one of them: an odd one before it is done, an even one after.

    Args:
        die_at: the number of the write; 0: none.
        counted: a file for how many there were, kept up to date.
    """
    count = 0

    def watched(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if not die_at:
                descriptor = os.open(counted, os.O_WRONLY | os.O_CREAT)
                os.write(descriptor, b"%06d" % count)
                os.close(descriptor)
            if count == die_at and count % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "unlink"), (Path, "write_text")):
        setattr(module, name, watched(getattr(module, name)))
    generations.save_file = watched(generations.save_file)


def child(order: dict) -> None:
    """Do what an order says, and end the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: a job in the background ignores it
    descriptor = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["cbq", *order["argv"]]
    if order["die_at"] is not None:
        count_writes(order["die_at"], Path(order["output"] + ".writes"))
    code = 1
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        process = os.fork()
        if not process:
            child(json.loads(line))
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
