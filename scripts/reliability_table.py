"""Writes docs/reliability.md: what was done to runs and files, how often, and what was lost.

    python scripts/reliability_table.py [FILE ...]

Runs `tests/reliability` with its slow tests (about half an hour on two quiet cores), or only the named files of it, and
counts; no network. Rows of tests that are not run stay as they are. Full and read-only disks need root, for a file
system of their own; they are shown as not run otherwise.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A test -> what it does, and what surviving means.
KILLS = {
    "test_killed_at_random_moments": ("SIGKILL at a random moment, again and again until the run ends", "same bits"),
    "test_killed_at_writes": ("SIGKILL right before or after a call that changes the disk", "same bits"),
    "test_asked_to_end[sigint": ("SIGINT at a random moment", "exit code 130, says how to go on, same bits"),
    "test_asked_to_end[sigterm": ("SIGTERM at a random moment", "exit code 143, says how to go on, same bits"),
    "test_a_full_disk": ("the disk is full from some point on", "one line; with room, same bits"),
    "test_a_disk_that_cannot_be_written_to": ("a read-only disk", "one line; then same bits"),
    "test_a_disk_that_can_no_longer_be_written_to": ("the disk turns read-only in mid-run", "one line; then same bits"),
    "test_a_damaged_state[truncated": ("a file of the state is cut in half", "same bits, or one line and no change"),
    "test_a_damaged_state[a bit flipped": (
        "one bit of a file of the state flips",
        "same bits, or one line and no change",
    ),
    "test_a_damaged_state[deleted": ("a file of the state is deleted", "same bits, or one line and no change"),
    "test_two_runs_in_one_folder": (
        "a second run in the folder of one at work",
        "the second is refused, the first ends",
    ),
}
OTHERS = {
    "test_config_fuzz.py": ("random combinations of options, good and bad", "a run, or one line and exit code 2"),
    "test_a_broken_model_folder": ("a broken model folder", "one line, or the right model"),
    "test_a_broken_checkpoint": ("a broken checkpoint of cbq", "one line, or the same logits"),
    "unpickled": ("a planted pickle in the place of a file", "never loaded"),
    "code": ("code planted in a checkpoint or a stored configuration", "never run"),
    "index_does_not_reach_outside": ("an index that names files elsewhere", "refused"),
    "test_hostile_files.py": ("other hostile files (pipes, links, names, data)", "one line, or the right result"),
    "test_odd_numbers": (
        "zero or constant channels, huge activations, one-token segments, ... x methods",
        "finite, sound",
    ),
    "test_numbers.py": ("overflow, NaN, infinities, diverging losses", "said in a line, nothing spoiled"),
}
HEAD = """# What cbq survives

Made by `python scripts/reliability_table.py`, which runs `tests/reliability` with its slow tests. *Tried* counts faults
that happened (a kill that came after the end is not one); *survived*: what the last column says came true; *lost*:
anything else. *Same bits*: the run goes on and ends with the checkpoint, the scores and the losses of a run that
nothing happened to, equal to the bit.

"""


def git(*arguments: str) -> str:
    """Return what git says in the repository, stripped."""
    return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True).stdout.strip()


class Outcomes:
    """Collects what pytest found."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}  # title -> tried, lost, not run
        commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "src", "tests", "conf")
        self.commit = f"{commit}-dirty" if changed else commit  # the page itself changes all the time

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test's faults under its title."""
        title = next((title for part, title in (KILLS | OTHERS).items() if part in report.nodeid), None)
        if title is None or (report.when != "call" and report.passed) or (report.when == "teardown"):
            return
        counts = self.counts.setdefault(title[0], [0, 0, 0])
        tried = dict(report.user_properties).get("tried", 1)
        counts[2 if report.skipped else 0] += tried
        counts[1] += tried if report.failed else 0
        self.write()  # now: it takes long

    def write(self) -> None:
        """Write the page with what was counted so far."""
        page = ROOT / "docs" / "reliability.md"
        before = page.read_text(encoding="utf-8") if page.is_file() else ""
        earlier = {line[2:].split(" | ")[0]: line for line in before.splitlines() if line.startswith("| ")}
        lines = [
            "| fault | tried | survived | lost | survived means | commit |",
            "| --- | ---: | ---: | ---: | --- | --- |",
        ]
        for title, meaning in dict.fromkeys((KILLS | OTHERS).values()):
            tried, lost, skipped = self.counts.get(title, [0, 0, 1])
            figures = ["not run"] * 3 if skipped and not tried else [str(tried), str(tried - lost), str(lost)]
            row = " | ".join([title, *figures, meaning, self.commit])
            lines.append(f"| {row} |" if title in self.counts else earlier.get(title, f"| {row} |"))
        rest = before.partition("\n## ")[2]
        text = HEAD + "\n".join(lines) + f"\n\n{platform.system()} {platform.machine()}.\n"
        page.write_text(text + (f"\n## {rest}" if rest else ""), encoding="utf-8")


def main() -> None:
    """Run the tests; the exit code is pytest's."""
    tests = [str(ROOT / "tests" / "reliability" / name) for name in sys.argv[1:] or [""]]
    code = pytest.main([*tests, "-p", "no:cacheprovider", "-m", "slow or not slow"], [Outcomes()])
    sys.exit(code)


if __name__ == "__main__":
    main()
