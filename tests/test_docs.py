"""The commands that README and docs print: each composes, and is one that the program would begin with."""

import functools
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from cbq.cli import conf_dir
from cbq.cli.commands import COMMANDS
from cbq.cli.mistakes import check_choices, check_flags
from cbq.cli.options import check_combination, check_keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(r"(?:^|; *|OMP_NUM_THREADS=\d )(?:python run\.py|python -m cbq|cbq) +(?=\S)")
EXAMPLES = {"<scheme>": "w4a16", "<method>": "rtn", "<target>": "none", "<format>": "gptq"}  # else a path


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of ours in a page's blocks, after the program's name; variables are put in."""
    found = []
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.S | re.M):
        lines = block.replace("\\\n", " ").splitlines()
        variables = dict(line.split("=", 1) for line in lines if re.match(r'[A-Z]+="', line))
        for line in lines:
            if program := PROGRAM.search(line.strip()):
                rest = line.strip()[program.end() :]
                for name, value in variables.items():
                    rest = rest.replace(f"${name}", shlex.split(value)[0])
                rest = re.sub(r"<\w[^>]*>", lambda word: EXAMPLES.get(word[0], "x"), rest)
                found.append([word for word in shlex.split(rest, comments=True) if not word.endswith("...")])
    return found


def jobs(words: list[str]) -> list[list[str]]:
    """Return what hydra would compose of a sweep's options: every value of each once, not every combination, and of a
    table two cells (`test_experiments.py` composes them all)."""
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # it finds what a glob stands for
    axes = [
        [f"{option.get_key_element()}={value}" for value in option.sweep_string_iterator()]
        if option.is_sweep_override()
        else [option.input_line]
        for option in parser.parse_overrides(words)
    ]
    axes = [axis[:2] if axis[0].startswith("experiment=") else axis for axis in axes]
    return [[axis[number % len(axis)] for axis in axes] for number in range(max(map(len, axes), default=1))]


@functools.cache  # the same table with three launchers
def begin(config_name: str, job: tuple[str, ...]) -> None:
    """Do what the program does with a job before any work."""
    config = compose(config_name, overrides=list(job))
    check_keys(config, config_name)
    if config_name == "config":
        check_combination(config, job)


FOUND = [(page.name, words) for page in PAGES for words in commands(page.read_text(encoding="utf-8"))]


def test_commands_are_found():
    assert len(FOUND) > 50
    assert ["-m", "experiment=glob(table3c_*)"] in [words for _, words in FOUND]


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{page}: {' '.join(words)}" for page, words in FOUND])
def test_a_printed_command_is_one_that_begins(page, words):
    name = words[0] if words and words[0] in COMMANDS else "quantize"
    command = COMMANDS[name]
    options = [command.flags.get(word, word) for word in words[words[:1] == [name] :]]
    if options[:1] and options[0].startswith("resume="):
        return  # what is resumed says how it began
    check_flags(options)
    check_choices(options)
    typed = [word for word in command.overrides(options) if not word.startswith(("-", "hydra", "job"))]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for job in jobs(typed):
            begin(command.config_name, tuple(job))
