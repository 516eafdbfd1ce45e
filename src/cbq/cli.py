"""The command line: pick the command, compose its configuration, build its objects, run it.

The only file that imports hydra. Exit codes: 0 done, 2 the user's mistake (one line), 1 a fault of ours (a
traceback, and `error.txt` in the run folder).
"""

import os
import sys
import traceback
from collections.abc import Callable
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
from cbq.run_folder import RunFolder

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
    if words and "=" not in words[0] and words[0][0] not in "-+~":
        command = words.pop(0)
    if command not in COMMANDS:
        print(f"cbq: unknown command {command!r}: it must be one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = words
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra raises what it would print, so that it can be said in one line
    config_name, task = COMMANDS[command]
    codes: list[int] = []
    application = hydra.main(version_base="1.3", config_path=conf_dir(), config_name=config_name)
    try:
        application(lambda config: codes.append(run_job(task, config)))()
    except KeyboardInterrupt:
        print("cbq: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"cbq: {line}", file=sys.stderr)
        sys.exit(2)
    sys.exit(max(codes, default=0))


def run_job(task: Callable[[DictConfig, RunFolder], None], config: DictConfig) -> int:
    """Run one job and return its exit code; in a sweep raise instead, so that every launcher sees the failure.

    Raises:
        InputError: in a sweep, the user's mistake. The sweep goes on with its other jobs.
    """
    job = HydraConfig.get()
    in_sweep = job.mode is RunMode.MULTIRUN
    folder = RunFolder(Path(job.runtime.output_dir), config, config.overwrite)
    if in_sweep:
        print(f"\njob {job.job.num}: {job.job.override_dirname}", flush=True)
    try:
        task(config, folder)
    except Exception as error:
        line = explain(error)
        folder.withdraw()
        if line is None:
            if folder.path.is_dir():
                (folder.path / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
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
    runner = instantiate(config.runner, folder=folder, settings=flatten(config))
    try:
        runner.run()
    except BaseException as error:
        runner.fail(error)
        raise


COMMANDS = {"quantize": ("config", quantize)}


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
        if isinstance(link, InstantiationException) and isinstance(link.__cause__, TypeError):
            return one_line(link.__cause__)
        if isinstance(link, ConfigCompositionException | OmegaConfBaseException):
            return one_line(link)
    if isinstance(chain[0], HydraException) and not isinstance(chain[0], InstantiationException):
        return one_line(chain[0])
    return None


def unknown_key(error: ConfigKeyError | ConfigAttributeError) -> str:
    """Return what key a user may have meant."""
    key = error.full_key or str(error.key)
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        config = hydra.compose("config")
    known = [*flatten(config), *config]
    parent = key.rpartition(".")[0]
    siblings = [name for name in known if parent and name.startswith(f"{parent}.")]
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"it must be one of {', '.join(siblings or list(config))}"
    return f"unknown option {key!r}: {hint}"


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
