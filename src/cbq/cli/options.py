"""The options of a command: where they are written down, and which of them go together."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from cbq.errors import InputError

NOT_SETTINGS = {"runner", "evaluator", "tracking", "report", "overwrite", "hydra"}
NOT_OPTIONS = {"runner", "evaluator", "command", "defaults", "hydra"}


def conf_dir() -> str:
    """Return the folder of the YAML files: inside an installed package, or beside the sources of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise AssertionError("the package was built without its conf folder")


def check_keys(config: DictConfig, config_name: str = "config") -> None:
    """Refuse a top-level key that nothing reads; a `+` makes hydra accept any.

    Args:
        config: the composed configuration.
        config_name: the primary file of the command.

    Raises:
        InputError: there is one.
    """
    main_file = OmegaConf.load(Path(conf_dir()) / f"{config_name}.yaml")
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
        if OmegaConf.is_config(config.get(group)) and group not in used | NOT_OPTIONS | {"debug", "tracking", "report"}:
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
