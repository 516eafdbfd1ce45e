"""The program: pick the command, compose its configuration, run it, explain mistakes."""

import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cbq.cli.commands import COMMANDS, Command
from cbq.cli.made import THERE
from cbq.cli.mistakes import check_choices, check_flags, explain, while_composing
from cbq.cli.options import conf_dir, unpin_
from cbq.cli.resolvers import register
from cbq.cli.resume import resumed
from cbq.errors import InputError, one_line
from cbq.run_folder import ERROR_NAME, withdraw

register()  # here, so that a launcher's process has them as soon as it unpacks its job

USAGE = """cbq: cross-block quantization of large language models

  cbq <option=value ...>            quantize a model (the same as: cbq quantize ...)
  cbq quant=w4a4 cbd.overlap=1      the embedded model at 4 bits
  cbq -m quant=w4a4,w2a16           a sweep: every combination, one run each
  cbq -q ..., cbq -v ...            say nothing but mistakes; say more
  cbq model=hf model.path=<folder or hub id> quant=w4a16 quant.group_size=128
  cbq resume=<run folder>           go on with a run that was interrupted

Commands:
  quantize    quantize a model, evaluate it, save it
              (cbq quantize --help lists the option groups, cbq quantize --cfg job every option)
  evaluate    measure without quantizing: cbq evaluate checkpoint=<folder> [model=<name> to compare with]
  analyze     the paper's Figure 1 of a model, and which linears need more bits: cbq analyze quant=w3a16
  export      write a checkpoint for an engine: cbq export outputs/<date>/<time> export=compressed_tensors
  generate    continue a text: cbq generate outputs/<date>/<time> prompt="..." [compare=true]
  reproduce   run a finished run again, and compare: cbq reproduce <run folder>
  report      the page of a run, the table of a sweep: cbq report outputs/<date>/<time>, cbq report multirun/table3c
  runs        the finished runs below a folder: cbq runs [folder] [sort=perplexity]
"""


def main() -> None:
    """Run the command that sys.argv names, and exit with its code."""
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"], ["help"]):
        print(USAGE, end="")
        sys.exit(0)
    command = "quantize"
    if words and "=" not in words[0] and not words[0].startswith(("-", "+", "~")):
        command = words.pop(0)
    if command not in COMMANDS:
        print(f"cbq: unknown command {command!r}: it must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    chosen = COMMANDS[command]
    if not chosen.fills_folder and {"-m", "--multirun"} & set(words):
        print(f"cbq: {command} is one job: leave out -m", file=sys.stderr)
        sys.exit(2)
    words = [chosen.flags.get(word, word) for word in words]
    try:
        sys.argv[1:] = chosen.overrides(resumed(words) if chosen.fills_folder else words)
    except InputError as error:
        print(f"cbq: {error}", file=sys.stderr)
        sys.exit(2)
    stopped = Stopped()
    signal.signal(signal.SIGTERM, stopped)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra raises what it would print, so that it can be said in one line
    codes: list[int] = []
    jobs = Jobs()
    application = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=chosen.config_name)
    try:
        check_flags(sys.argv[1:])
        check_choices(sys.argv[1:])
        application(lambda config: codes.append(run_job(chosen, config, jobs)))()
    except KeyboardInterrupt:
        print(f"cbq: {'terminated' if stopped.by_signal else 'interrupted'}", file=sys.stderr)
        sys.exit(128 + (stopped.by_signal or signal.SIGINT))
    except Exception as error:
        line = explain(error, chosen.config_name)
        if line is None and isinstance(error, OSError) and not jobs.started:
            line = f"hydra.run.dir {error.filename} cannot be made: {error.strerror}"
        if line is None and not jobs.started and while_composing(error):
            line = one_line(error)
        if line is None:
            raise
        if jobs.failed:
            line = f"failed jobs: {', '.join(map(str, jobs.failed))}; the others are done"
        print(f"cbq: {line}", file=sys.stderr)
        sys.exit(2)
    sys.exit(max(codes, default=0))


class Stopped:
    """A handler that ends the program as Ctrl-C does: runs write down how far they are.

    Attributes:
        by_signal: which came; 0: none.
    """

    def __init__(self) -> None:
        self.by_signal = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        self.by_signal = number
        raise KeyboardInterrupt


@dataclass
class Jobs:
    """What became of the jobs of one command.

    Args:
        started: whether any has.
        failed: the numbers of those of a sweep that did.
    """

    started: bool = False
    failed: list[int] = field(default_factory=list)


def run_job(command: Command, config: DictConfig, jobs: Jobs) -> int:
    """Run one job and return its exit code; in a sweep raise instead, so that every launcher sees the failure.

    Args:
        command: which.
        config: the composed configuration.
        jobs: is told.

    Raises:
        InputError: in a sweep, the user's mistake. The sweep goes on with its other jobs.
    """
    job = HydraConfig.get()
    in_sweep = job.mode is RunMode.MULTIRUN
    jobs.started = True
    path = Path(job.runtime.output_dir)
    if in_sweep:
        print(f"\njob {job.job.num}: {job.job.override_dirname}", flush=True)
    try:
        unpin_(config, job.overrides.task)
        command.task(config)
    except Exception as error:
        line = explain(error, command.config_name)
        if command.fills_folder:
            # A job in a process of its own does not know what was there before the sweep.
            withdraw(path, THERE or {path.absolute().parent})
        jobs.failed += [job.job.num] if in_sweep else []
        if line is None:
            if command.fills_folder and path.is_dir() and not (path / ERROR_NAME).exists():
                (path / ERROR_NAME).write_text(traceback.format_exc(), encoding="utf-8")
            raise
        where = f"job {job.job.num}: " if in_sweep else ""
        print(f"cbq: {where}{line}", file=sys.stderr)
        if in_sweep:
            raise InputError(f"job {job.job.num} failed ({line})") from None
        return 2
    return 0
