"""What the user did wrong, in one line."""

import re
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from cbq.cli.options import NOT_OPTIONS, conf_dir, flatten
from cbq.durable import disk_fault
from cbq.errors import InputError, one_line

# What a launcher's configuration extends -> the extra that brings it.
EXTRAS = {"hydra/launcher/joblib": "joblib", "hydra/launcher/submitit_slurm": "slurm", "hydra/launcher/ray": "ray"}
MOST = 4000  # characters: the names of all experiments
SIGNATURE_ERROR = re.compile(r"unexpected keyword argument|missing \d+ required")


def explain(error: BaseException | None, config_name: str = "config") -> str | None:
    """Return the user's mistake behind an error, or what the disk refused, in one line, or None if the fault is ours.

    Args:
        error: what was raised.
        config_name: the primary file of the command.
    """
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for link in chain:
        if isinstance(link, InputError):
            return one_line(link, MOST)
        if isinstance(link, MissingMandatoryValue | InterpolationToMissingValueError):
            key = getattr(link, "full_key", None) or one_line(link, MOST)
            return f"{key} is required: give {key}=<value>"
        if isinstance(link, ConfigKeyError | ConfigAttributeError):
            return unknown_key(link, config_name)
        if isinstance(link, MissingConfigException):
            if link.missing_cfg_file in EXTRAS:
                return f"this launcher needs an extra: pip install 'cbq[{EXTRAS[link.missing_cfg_file]}]'"
            options = ", ".join(link.options or [])
            return f"{link.missing_cfg_file!r} does not exist" + (f": it must be one of {options}" if options else "")
    for link in chain:
        if fault := disk_fault(link):
            return f"cannot write: {fault}"
        # An argument that a class does not have, or that is missing; any other TypeError is a fault of ours.
        if isinstance(link, InstantiationException) and SIGNATURE_ERROR.search(str(link.__cause__)):
            return one_line(link.__cause__, MOST)
        if isinstance(link, ConfigCompositionException | OmegaConfBaseException):
            return one_line(link, MOST)
    if isinstance(chain[0], HydraException) and not isinstance(chain[0], InstantiationException):
        return one_line(chain[0], MOST)
    return None


def unknown_key(error: ConfigKeyError | ConfigAttributeError, config_name: str) -> str:
    """Return what key a user may have meant, given the choices of groups on the command line."""
    key = error.full_key or str(error.key)
    known = {"/".join(path.relative_to(conf_dir()).with_suffix("").parts) for path in Path(conf_dir()).glob("*/*.yaml")}
    choices = [word for word in sys.argv[1:] if word.replace("=", "/", 1) in known]
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        config = hydra.compose(config_name, overrides=choices)
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


def check_flags(words: Sequence[str]) -> None:
    """Refuse a word that hydra takes for a flag of its own and does not know: argparse would print a page.

    Raises:
        InputError: there is one.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise InputError(one_line(ValueError(message)))

    parser.error = refuse
    parser.parse_args(list(words))


def check_choices(words: Sequence[str]) -> None:
    """Refuse a group of options that is chosen to be nothing: hydra's own line does not say which.

    Raises:
        InputError: there is one.
    """
    for word in words:
        group, _, choice = word.partition("=")
        choices = sorted(path.stem for path in (Path(conf_dir()) / group).glob("*.yaml")) if choice == "null" else []
        if choices:
            raise InputError(f"{group} must be one of {', '.join(choices)}, got null")


def while_composing(error: BaseException) -> bool:
    """Return whether hydra raised an error while it made a configuration of the command line: it has no type for all
    of them."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).name == "config_loader_impl.py" for frame in frames)
