"""The commands that make a sweep again, read by hydra itself."""

import re
import shlex
from itertools import product
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from cbq.report.again import sweep_again


def jobs_of(words: list[str]) -> list[list[str]]:
    """Return the jobs that hydra makes of the words of a sweep."""
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    return batch


def test_the_commands_make_the_same_jobs(result, tmp_path):
    """Two sweeps into one folder, of which one lacks a cell, with values of every kind."""
    losses = ["experiment=table5_kld", "experiment=table5_l2"]
    typed = [list(each) for each in product(losses, ["seed=0", "seed=1"], ["evaluation.corpora=[c4,embedded]"])]
    more = ["'quant.overrides=[{linears: \".*fc\", weight_bits: 8}]'".strip("'"), "calibration.path='a b, c'"]
    typed += [[*more, "~loss", f"cbd.window={window}", f"seed={s}"] for window, s in ((1, 0), (1, 1), (2, 0), (3, 0))]
    work, folder = tmp_path / "work", tmp_path / "work" / "multirun" / "it's"
    runs = [result() | {"overrides": each, "working_folder": str(work)} for each in typed]
    runs.append(result())  # of before there were overrides
    comment, checkout, *commands, report = sweep_again(runs, folder).splitlines()
    assert comment == "# 1 runs do not say what was typed"
    assert checkout == "git checkout abc"
    assert shlex.split(report) == ["python", "run.py", "report", "multirun/it's"]
    assert len(commands) == 1 + 2
    made = []
    for command in commands:
        *words, place = shlex.split(command)
        assert words[:3] == ["python", "run.py", "-m"]
        (parsed,) = OverridesParser.create().parse_overrides([place])
        assert (parsed.key_or_group, parsed.value()) == ("hydra.sweep.dir", "multirun/it's")
        made += jobs_of(words[3:])
    expected = [job for words in typed for job in jobs_of(words)]
    assert sorted(map(sorted, made)) == sorted(map(sorted, expected))


def test_each_commit_and_a_folder_elsewhere(result, tmp_path):
    runs = [result() | {"overrides": ["seed=0"], "working_folder": "/nowhere"} for _ in range(2)]
    runs[1]["environment"] = {"git_commit": "def-dirty"}
    text = sweep_again(runs, tmp_path)
    assert re.findall("git checkout (.*)", text) == ["abc", "def  # and the changes that were not committed"]
    assert text.count(f"hydra.sweep.dir={tmp_path}") == 2


def test_nothing_where_no_run_says_what_was_typed(result):
    assert sweep_again([result()], Path("multirun")) == ""
