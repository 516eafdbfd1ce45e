"""The command line: pick the command, compose its configuration, build its objects, run it.

The only file that imports hydra. Exit codes: 0 done, 2 the user's mistake (one line), 1 a fault of ours (a
traceback, and `error.txt` in the run folder).
"""

import hashlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from cbq.errors import InputError
from cbq.run_folder import RunFolder, withdraw

USAGE = """cbq: cross-block quantization of large language models

  cbq <option=value ...>            quantize a model (the same as: cbq quantize ...)
  cbq quant=w4a4 cbd.overlap=1      the embedded model at 4 bits
  cbq -m quant=w4a4,w2a16           a sweep: every combination, one run each
  cbq model=hf model.path=<folder or hub id> quant=w4a16 quant.group_size=128

Commands:
  quantize    quantize a model, evaluate it, save it
              (cbq quantize --help lists the option groups, cbq quantize --cfg job every option)
"""


def conf_dir() -> str:
    """Return the folder of the YAML files: inside an installed package, or beside the sources of a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise AssertionError("the package was built without its conf folder")


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
    sys.argv[1:] = words
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra raises what it would print, so that it can be said in one line
    config_name, task = COMMANDS[command]
    codes: list[int] = []
    jobs = Jobs()
    application = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", sweep_folder, replace=True)
    try:
        application(lambda config: codes.append(run_job(task, config, jobs)))()
    except KeyboardInterrupt:
        print("cbq: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = explain(error)
        if line is None and isinstance(error, OSError) and not jobs.started:
            line = f"hydra.run.dir {error.filename} cannot be made: {error.strerror}"
        if line is None:
            raise
        if jobs.failed:
            line = f"failed jobs: {', '.join(map(str, jobs.failed))}; the others are done"
        print(f"cbq: {line}", file=sys.stderr)
        sys.exit(2)
    sys.exit(max(codes, default=0))


@dataclass
class Jobs:
    """What became of the jobs of one command.

    Args:
        started: whether any has.
        failed: the numbers of those of a sweep that did.
    """

    started: bool = False
    failed: list[int] = field(default_factory=list)


def folder_name(dirname: str) -> str:
    """Return a name for one folder from a sweep job's overrides: no path in it, and not too long for a disk.

    Example:
        >>> folder_name("quant=w4a4,calibration.path=../a.txt")
        'quant=w4a4,calibration.path=.._a.txt'
    """
    name = dirname.replace("/", "_").replace(chr(92), "_")
    if len(name.encode()) <= MAX_FOLDER_BYTES:
        return name
    digest = hashlib.sha256(dirname.encode()).hexdigest()[:12]
    return name.encode()[: MAX_FOLDER_BYTES - 13].decode(errors="ignore") + "-" + digest


def sweep_folder(overrides: Sequence[str], dated: str) -> str:
    """Return where a sweep's jobs are: one folder a table, so that finished cells are found again, else a new one.

    Args:
        overrides: the command line of a sweep, or those of one of its jobs.
        dated: the folder of a sweep without experiments.

    Example:
        >>> sweep_folder(["experiment=glob(table3c_*)", "model=pico"], "2024-01-01")
        'table3c'
        >>> sweep_folder(["experiment=table3c_w2_o1", "model=pico"], "2024-01-01")
        'table3c'
        >>> sweep_folder(["quant=w4a4,w2a16"], "2024-01-01")
        '2024-01-01'
    """
    found = [re.match(r"experiment=(?:glob\()?([A-Za-z0-9]+)", override) for override in overrides]
    return next((match[1] for match in found if match), dated)


def run_job(task: Callable[[DictConfig, RunFolder], None], config: DictConfig, jobs: Jobs) -> int:
    """Run one job and return its exit code; in a sweep raise instead, so that every launcher sees the failure.

    Args:
        task: the command.
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
        folder = RunFolder(path, config, config.overwrite)
        task(config, folder)
    except Exception as error:
        line = explain(error)
        withdraw(path)
        jobs.failed += [job.job.num] if in_sweep else []
        if line is None:
            if path.is_dir():
                (path / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            raise
        where = f"job {job.job.num}: " if in_sweep else ""
        print(f"cbq: {where}{line}", file=sys.stderr)
        if in_sweep:
            raise InputError(f"job {job.job.num} failed ({line})") from None
        return 2
    return 0


def quantize(config: DictConfig, folder: RunFolder) -> None:
    """Quantize one model into `folder`, unless this very run is finished there."""
    if folder.is_finished():
        print(f"already finished: {folder.path} (overwrite=true starts anew)")
        return
    check_keys(config)
    check_combination(config, HydraConfig.get().overrides.task)
    choices = {key: choice for key, choice in HydraConfig.get().runtime.choices.items() if "/" not in key}
    settings = flatten(config)
    settings |= {key: choice for key, choice in choices.items() if choice is not None and key not in NOT_SETTINGS}
    with folder.held():
        runner = instantiate(config.runner, folder=folder, settings=settings)
        try:
            runner.run()
        except BaseException as error:
            runner.fail(error)
            raise


COMMANDS = {"quantize": ("config", quantize)}


def check_keys(config: DictConfig) -> None:
    """Refuse a top-level key that nothing reads; a `+` makes hydra accept any.

    Raises:
        InputError: there is one.
    """
    main_file = OmegaConf.load(Path(conf_dir()) / "config.yaml")
    groups = [group for entry in main_file.defaults if isinstance(entry, DictConfig) for group in entry]
    known = [key for key in (*groups, *main_file) if not key.startswith("override") and key not in NOT_OPTIONS]
    unknown = sorted(set(config) - set(known) - NOT_OPTIONS)
    if unknown:
        close = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it must be one of {', '.join(known)}"
        raise InputError(f"unknown option {unknown[0]!r}: {hint}")


def check_combination(config: DictConfig, typed: Sequence[str]) -> None:
    """Refuse an option that the chosen method has no use for, where the user typed both.

    Args:
        config: the composed configuration.
        typed: the command line.

    Raises:
        InputError: there is one.
    """
    groups = [re.split(r"[=.@]", word.lstrip("+~"))[0] for word in typed]
    if "method" not in groups:
        return
    used, unread = {"method"}, ["runner"]
    while unread:
        node = config.get(unread.pop())
        text = str(OmegaConf.to_container(node)) if OmegaConf.is_config(node) else ""
        found = {name for name in re.findall(r"\$\{(\w+)", text) if name in config} - used
        used |= found
        unread += found
    for group in groups:
        if OmegaConf.is_config(config.get(group)) and group not in used | NOT_OPTIONS | {"debug", "tracking"}:
            raise InputError(f"{group} means nothing with method={config.method.name}: leave it out")


def flatten(config: DictConfig, prefix: str = "") -> dict:
    """Return every option of the experiment by its dotted key, as results and W&B list them."""
    flat = {}
    for key in config:
        if key.startswith("_") or OmegaConf.is_interpolation(config, key) or prefix + key in NOT_SETTINGS:
            continue
        value = config[key]
        if isinstance(value, DictConfig):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return flat


NOT_SETTINGS = {"runner", "tracking", "overwrite", "hydra"}
NOT_OPTIONS = {"runner", "defaults", "hydra"}
SIGNATURE_ERROR = re.compile(r"unexpected keyword argument|missing \d+ required")
MAX_FOLDER_BYTES = 200


def explain(error: BaseException | None) -> str | None:
    """Return the user's mistake behind an error in one line, or None if the fault is ours."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, InputError):
            return one_line(link)
        if isinstance(link, MissingMandatoryValue | InterpolationToMissingValueError):
            key = getattr(link, "full_key", None) or one_line(link)
            return f"{key} is required: give {key}=<value>"
        if isinstance(link, ConfigKeyError | ConfigAttributeError):
            return unknown_key(link)
        if isinstance(link, MissingConfigException):
            options = ", ".join(link.options or [])
            return f"{link.missing_cfg_file!r} does not exist" + (f": it must be one of {options}" if options else "")
    for link in chain:
        # An argument that a class does not have, or that is missing; any other TypeError is a fault of ours.
        if isinstance(link, InstantiationException) and SIGNATURE_ERROR.search(str(link.__cause__)):
            return one_line(link.__cause__)
        if isinstance(link, ConfigCompositionException | OmegaConfBaseException):
            return one_line(link)
    if isinstance(chain[0], HydraException) and not isinstance(chain[0], InstantiationException):
        return one_line(chain[0])
    return None


def unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    """Return what key a user may have meant, given the choices of groups on the command line."""
    key = error.full_key or str(error.key)
    groups = {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()}
    choices = [word for word in sys.argv[1:] if word.partition("=")[0] in groups and "," not in word]
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        config = hydra.compose("config", overrides=choices)
    for missing in OmegaConf.missing_keys(config):
        OmegaConf.update(config, missing, None)
    options = [option for option in (*flatten(config), *config) if option not in NOT_OPTIONS]
    group = key.partition(".")[0]
    siblings = [option for option in options if option.startswith(f"{group}.")] if "." in key else list(config)
    if key in options or not siblings:  # it exists in another job of a sweep; or the choice has no options
        return f"option {key!r} does not exist for every choice of {group}"
    leaves = {option.rpartition(".")[2]: option for option in siblings}
    close = get_close_matches(key.rpartition(".")[2], leaves, n=1)
    hint = f"did you mean {leaves[close[0]]}?" if close else f"it must be one of {', '.join(siblings)}"
    return f"unknown option {key!r}: {hint}"


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
