"""The command: read the options, run the parts, print the table, write JSON and a plot."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks import fusion, growth, memory, phases, steps
from benchmarks.compare import other_machine, verdict
from benchmarks.plan import Plan
from benchmarks.plot import write_plot
from benchmarks.rows import Row, Skipped, read_rows, to_json
from benchmarks.shapes import SIZES, default_device
from benchmarks.table import render
from cbq.errors import InputError
from cbq.results import environment

PARTS: dict[str, Callable[[Plan], Iterator[Row | Skipped]]] = {
    "step": steps.measure,
    "fusion": fusion.measure,
    "growth": growth.measure,
    "memory": memory.measure,
    "run": phases.measure,
}
DEFAULT_SIZES = "pico,1b,7b"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are the one line that every mistake gets."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options.

    Raises:
        InputError: one is unknown, or has a value that is not allowed.
    """
    parser = OneLineParser("python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("--sizes", help=f"of {','.join(SIZES)}; {DEFAULT_SIZES} by default")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}; all by default")
    parser.add_argument("--repeats", type=int, help="interleaved repeats a ratio; 5 by default")
    parser.add_argument(
        "--quick", action="store_true", help="the smallest sizes, in seconds: shows that all of it runs"
    )
    parser.add_argument("--compare", type=Path, metavar="BASELINE.json", help="show an earlier run's values beside")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder of JSON and plot")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    options = parser.parse_args(arguments)
    if options.sizes is None:
        options.sizes = "tiny" if options.quick else DEFAULT_SIZES
    options.repeats = (2 if options.quick else 5) if options.repeats is None else options.repeats
    if options.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {options.repeats}")
    if options.output.exists() and not options.output.is_dir():
        raise InputError(f"--output must be a folder, got {options.output}")
    options.sizes = choose("--sizes", options.sizes, list(SIZES))
    options.only = choose("--only", options.only, list(PARTS))
    return options


def choose(option: str, text: str, known: list[str]) -> list[str]:
    """Return the names of a comma-separated list, in the order in which they are known.

    Raises:
        InputError: one is not known.

    Example:
        >>> choose("--sizes", "1b,pico", ["pico", "1b", "7b"])
        ['pico', '1b']
    """
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{option} takes {', '.join(known)}, separated by commas; got {unknown[0]!r}")
    return [name for name in known if name in names]


def main(arguments: list[str]) -> int:
    """Run the benchmarks that the options name; return the exit code: 0, or 2 for a mistake of the user's."""
    try:
        run(parse(arguments), f"python -m benchmarks {' '.join(arguments)}".strip())
    except InputError as error:
        print(f"benchmarks: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace, command: str) -> None:
    """Measure, and report."""
    baseline, machine_then = read_rows(options.compare) if options.compare else (None, None)
    device = default_device()
    machine = environment(str(device)) | {"threads": torch.get_num_threads()}
    plan = Plan(tuple(SIZES[name] for name in options.sizes), options.repeats, device, options.quick)
    rows, skipped = collect(options.only, plan)
    options.output.mkdir(parents=True, exist_ok=True)
    content = json.dumps(to_json(rows, skipped, machine, command), indent=1)
    (options.output / "benchmarks.json").write_text(content + "\n", encoding="utf-8")
    print(render(rows, baseline))
    for line in skipped:
        print(f"skipped: {line.what}: {line.why}")
    print(describe(machine, options.repeats))
    if baseline is not None:
        report_changes(rows, baseline, other_machine(machine, machine_then))
    if not options.no_plot:
        write_plot(rows, options.output / "benchmarks.png", baseline)
    print(f"written to {options.output}")


def collect(parts: list[str], plan: Plan) -> tuple[list[Row], list[Skipped]]:
    """Return what the parts yield; on the way, say to stderr what is done."""
    rows: list[Row] = []
    skipped: list[Skipped] = []
    for part in parts:
        for line in PARTS[part](plan):
            if isinstance(line, Skipped):
                skipped.append(line)
            else:
                rows.append(line)
                print(f"{line.key}: {line.value:.3g}", file=sys.stderr, flush=True)
    return rows, skipped


def describe(machine: dict, repeats: int) -> str:
    """Return where and how it was measured, in one line."""
    name = machine["device_name"] or f"CPU, {machine['cores']} cores"
    return (
        f"{name}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['git_commit']}; "
        f"medians of {repeats} interleaved repeats"
    )


def report_changes(rows: list[Row], baseline: list[Row], other: str | None) -> None:
    """Print what `--compare` found."""
    before = {row.key: row for row in baseline}
    worse = [row.key for row in rows if verdict(row, before.get(row.key)) == "worse"]
    missing = sorted(set(before) - {row.key for row in rows})
    print(f"worse than the baseline by more than the noise: {len(worse)}")
    for key in worse:
        print(f"  {key}")
    if missing:
        print(f"in the baseline only: {len(missing)}")
    if other:
        print(other)
