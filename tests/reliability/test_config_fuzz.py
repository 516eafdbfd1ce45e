"""Random command lines of every command: each ends in success or in one clear line, never in a traceback."""

import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from cbq.analyzer import Analyzer
from cbq.api import quantize
from cbq.checkpoint import save_checkpoint
from cbq.cli import conf_dir, main
from cbq.models.loading import load_pretrained
from cbq.runner import Runner

GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
    for folder in Path(conf_dir()).iterdir()
    if folder.is_dir() and folder.name != "hydra"
}
BASE = (
    "evaluation=none",
    "tracking.mode=disabled",
    "calibration.num_segments=2",
    "calibration.segment_tokens=16",
    "reconstruction.epochs=1",
    "cbd.window=4",
)
MOST_STEPS, MOST_SEGMENTS, MOST_CANDIDATES = 8, 4, 40  # what is more is composed and tried, but not run
MOST_TOKENS, MOST_WIDTHS = 64, 2  # likewise, of an analysis
# What any option may be given: as it should be, of another type, out of range, or no value at all.
VALUES = (
    *("0", "1", "2", "3", "4", "8", "16", "32", "64", "128", "-1", "-7", "0.5", "1e-3", "1.0", "99.9", "0x10", "1_000"),
    *("nan", "inf", "-inf", "1e30", "1e400", "-1e30", "1000000000000", "100000000000000000000", "1" + "0" * 400),
    *(
        "true",
        "false",
        "null",
        "no",
        "''",
        "auto",
        "none",
        "text",
        "a b",
        "é漢字🙂",
        "'[/x]'",
        "'[bold]x'",
        "'\x1b[31m'",
    ),
    *("[]", "{}", "[1,2]", "[[1]]", "{a: 1}", "{_target_: nowhere.Nothing}", "[c4]", "[embedded]", "[null]", "???"),
    *("${seed}", "${nowhere}", "${oc.env:NO_SUCH_VARIABLE}", "${model}", "${oc.env:HOME}", "'$(id)'", "'../../x'"),
    *(
        "/",
        "/dev/null",
        "/proc/self/mem",
        "~",
        "~nobody/x",
        "./x",
        "x" * 300,
        "x" * 5000,
        "'\udcff'",
        "'a\nb'",
        "'\x00'",
    ),
)
# What hydra does not read as one value.
NO_VALUES = (
    "=",
    "a=b",
    ",",
    "1,2",
    "'",
    '"',
    "\\",
    "(",
    "glob(*)",
    "range(3)",
    "choice(1,2)",
    "%",
    "'${'",
    "\x00",
    "a\nb",
)


def leaves(node: DictConfig, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the options of a YAML file, with their values as one types them."""
    for key in node:
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            yield f"{prefix}{key}", "x"
        elif OmegaConf.is_dict(node[key]):
            yield from leaves(node[key], f"{prefix}{key}.")
        elif key not in ("defaults", "_target_", "_partial_", "_convert_"):
            yield f"{prefix}{key}", "null" if node[key] is None else str(node[key]).replace(" ", "")


def options() -> dict[str, str]:
    """Return every option of any choice of a group, with a value that it has somewhere."""
    found = {"seed": "0", "overwrite": "false"}
    for group, choices in GROUPS.items():
        for choice in choices if group not in ("experiment", "debug") else ():
            found |= dict(leaves(OmegaConf.load(Path(conf_dir()) / group / f"{choice}.yaml"), f"{group}."))
    return found


OPTIONS = options()
LOCAL_MODELS = ("pico", "pico_outliers", "hf")
GOOD = {group: choices for group, choices in GROUPS.items() if group not in ("model", "experiment")}

choices = st.sampled_from(sorted(GOOD)).flatmap(lambda group: st.sampled_from([f"{group}={c}" for c in GOOD[group]]))
good_options = st.sampled_from([f"{key}={value}" for key, value in sorted(OPTIONS.items())])
any_value = st.one_of(
    *[st.sampled_from(VALUES)] * 4, st.integers().map(str), st.floats().map(str), st.text(max_size=12).map(repr)
)
bad_options = st.builds("{}={}".format, st.sampled_from(sorted(OPTIONS)), any_value)
nonsense = st.one_of(
    st.builds("{}={}".format, st.sampled_from([*GROUPS, "hydra", "trainer", "runner", "runner.scheme"]), any_value),
    st.builds("{}={}".format, st.sampled_from([*GROUPS, *OPTIONS]), st.sampled_from(NO_VALUES)),
    st.builds(
        lambda mark, key, cut, tail, value: f"{mark}{key[:cut] + key[cut + 1 :]}{tail}={value}",
        st.sampled_from(("", "+", "++", "~", "+model.", "-", "--")),
        st.sampled_from(sorted([*OPTIONS, *GROUPS])),
        st.integers(0, 60),
        st.sampled_from(("", "", ".x", ".", "@model", "@_global_", "[0]")),
        any_value,
    ),
    st.text(max_size=20),
)
words = st.one_of(*[choices] * 3, *[good_options] * 2, *[bad_options] * 6, nonsense)
command_lines = st.builds(
    lambda found, again: [*found, *found[:again]],  # something given twice, now and then
    st.lists(words, min_size=1, max_size=4),
    st.sampled_from((0, 0, 0, 1)),
)


class Enough(SystemExit):
    """The command line is good, and the work that it asks for too much for a test."""


def prepare_only(runner: Runner, prepared: tuple) -> tuple:
    """Hand on what `prepare` gave, unless running it would take longer than a test may."""
    _, segments, plan, _ = prepared
    solver, step = runner.solver, runner.preprocess
    candidates = [getattr(each, "grid", 0) for each in (step, *getattr(step, "steps", ()))]
    work = solver.steps(len(segments)) * len(plan), getattr(solver, "num_steps", None) or 0
    much = max(work) > MOST_STEPS or len(segments) > MOST_SEGMENTS or max(candidates) > MOST_CANDIDATES
    if much or getattr(solver, "compile", False) is True or runner.evaluation.corpora():
        raise Enough(0)
    return prepared


def analyze_little(analyzer: Analyzer, prepared: tuple) -> tuple:
    """Hand on what `prepare` of an analysis gave, unless the rest would take longer than a test may."""
    loaded, segments = prepared
    figure, scan = analyzer.figure, analyzer.scan
    work = [figure.num_rows * figure.num_columns, len(figure.multipliers), *figure.bits] if figure else []
    much = max(work, default=0) > MOST_STEPS or max(len(part.bits) for part in (figure, scan) if part) > MOST_WIDTHS
    if much or segments.numel() > MOST_TOKENS or len(loaded.blocks) > MOST_SEGMENTS:
        raise Enough(0)
    return prepared


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, tiny_text_file: Path) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(tiny_text_file.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A run's folder with a W4A16 checkpoint."""
    path = tmp_path_factory.mktemp("run")
    loaded = load_pretrained(str(tiny_llama_folder))
    tokens = torch.randint(0, 320, (2, 16), generator=torch.Generator().manual_seed(0))
    quantize(loaded.model, tokens, scheme="w4a16", epochs=1, progress=False)
    save_checkpoint(loaded.model, loaded.tokenizer, path / "checkpoint")
    return path


@pytest.fixture(scope="module")
def cbq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """Return what runs a command line in an empty folder: exit code, standard error, what is in the folder then."""
    home = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        whole = Runner.prepare
        patch.setattr(Runner, "prepare", lambda runner: prepare_only(runner, whole(runner)))
        analysis = Analyzer.prepare
        patch.setattr(Analyzer, "prepare", lambda analyzer: analyze_little(analyzer, analysis(analyzer)))
        patch.setattr("cbq.runner.generate_text", lambda model, tokenizer, prompt: prompt)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)  # which composes a second time to find that out
        patch.setenv("HOME", str(home / "home"))

        def run(capture: pytest.CaptureFixture, *words: str) -> tuple[int, str, list[Path]]:
            shutil.rmtree(home / "cwd", ignore_errors=True)
            (home / "cwd").mkdir()
            patch.chdir(home / "cwd")
            patch.setattr(sys, "argv", ["cbq", *words])
            capture.readouterr()
            with pytest.raises(SystemExit) as exit_info:
                main()
            return exit_info.value.code, capture.readouterr().err, sorted((home / "cwd").iterdir())

        yield run


@pytest.fixture
def check(cbq, capsys, record_property) -> Callable[[list[str]], None]:
    """Runs a command line, which must end well or in one line, with nothing left behind; counts them."""
    numbers = itertools.count(1)

    def check(words: list[str]) -> None:
        record_property("tried", next(numbers))
        code, error, left = cbq(capsys, *words)
        assert code in (0, 2), words
        if code == 2:
            assert error.startswith("cbq: "), words
            assert len(error.splitlines()) == 1, words
            assert not left, words

    return check


def fuzz(max_examples: int) -> Callable:
    """Let hypothesis draw so many command lines, the same ones every time."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),  # a second is too long to look for a smaller one
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("number", [4, pytest.param(600, marks=pytest.mark.slow)])
def test_any_options_end_well_or_in_one_line(check, tiny_llama_folder, text, number) -> None:
    base = ("model=hf", f"model.path={tiny_llama_folder}", "calibration=text", f"calibration.path={text}", *BASE)

    @fuzz(number)
    @given(command_lines)
    def run(drawn: list[str]) -> None:
        check([*base, *drawn])

    run()


TEXTS = ("method.name=0", "method.name=null", "model.name=5", "model.name=[1]")


@pytest.mark.parametrize("model", ["hf", "pico"])
@pytest.mark.parametrize("word", TEXTS)
def test_what_is_a_text_is_nothing_else(cbq, capsys, tiny_llama_folder, text, model, word):
    """What hydra reads as a number was one until titles, tags and paths were made of it."""
    folder = [f"model.path={tiny_llama_folder}"] if model == "hf" else []
    code, error, left = cbq(
        capsys, f"model={model}", *folder, "calibration=text", f"calibration.path={text}", *BASE, word
    )
    assert (code, left) == (2, [])
    assert error.startswith(f"cbq: {word.partition('=')[0]} must be a text")
    assert len(error.splitlines()) == 1


OTHER_OPTIONS = {
    "evaluate": ("checkpoint", "evaluation.segment_tokens", "evaluation.stride", "evaluation.corpora", "model", "seed"),
    "generate": ("prompt", "max_tokens", "temperature", "seed", "compare", "checkpoint", "command.seed"),
    "export": ("export", "export.out", "export.verify", "export.verify_segments", "checkpoint", "export.format"),
    "report": ("folder", "seed"),
    "analyze": (
        *("figure", "figure.bits", "figure.linear", "figure.rows", "figure.columns", "figure.points", "figure.lowest"),
        *("figure.first_block", "scan", "scan.bits", "scan.budget", "quant", "quant.group_size", "model", "seed"),
    ),
    "runs": ("folder", "sort", "seed"),
    "reproduce": ("folder", "out", "seed"),
}
other_values = st.one_of(
    any_value, st.sampled_from(("gptq", "autoround", "none", "pico", "w4a4", "[c4,c4]", "2", "1.5"))
).filter(lambda value: value.strip("'\"") != "/")  # a whole disk is not looked through in a test


@pytest.mark.parametrize("number", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", OTHER_OPTIONS)
def test_any_options_of_other_commands(check, tmp_path, finished, tiny_llama_folder, text, command, number) -> None:
    base = {
        "evaluate": (f"checkpoint={finished}", f"evaluation.text_path={text}", "evaluation.segment_tokens=32"),
        "generate": (str(finished), "prompt=a", "max_tokens=1"),
        "export": (str(finished), f"export.out={tmp_path / 'out'}", "export.verify_segments=1"),
        "report": (str(finished),),
        "analyze": (
            *("model=hf", f"model.path={tiny_llama_folder}", "calibration=text", f"calibration.path={text}"),
            *("calibration.num_segments=1", "calibration.segment_tokens=16", f"evaluation.text_path={text}"),
            *("evaluation.segment_tokens=32", "figure.rows=2", "figure.columns=1", "figure.points=2"),
            *("figure.bits=[4]", "scan.bits=[2,4]"),
        ),
        "runs": (str(finished),),
        "reproduce": (str(finished),),
    }[command]
    option = st.builds("{}={}".format, st.sampled_from(OTHER_OPTIONS[command]), other_values)

    @fuzz(number)
    @given(st.lists(st.one_of(option, option, option, option, nonsense), min_size=1, max_size=3))
    def run(drawn: list[str]) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        check([command, *base, *drawn])

    run()
