"""The options of a command: where they are written down, and which of them go together."""

import inspect
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name  # hydra's own prints what it does not find
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from cbq.errors import InputError, one_line

NOT_SETTINGS = {
    "runner",
    "evaluator",
    "analyzer",
    "tracking",
    "report",
    "overwrite",
    "save_state",
    "verbosity",
    "hydra",
}
NOT_OPTIONS = {"runner", "evaluator", "analyzer", "command", "defaults", "hydra"}


def conf_dir() -> str:
    """Return the folder of the YAML files: inside an installed package, or beside the sources of a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parents[1] / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise AssertionError("the package was built without its conf folder")


def check_keys(config: DictConfig, config_name: str = "config") -> None:
    """Refuse a top-level key that nothing reads, which a `+` makes hydra accept, and a group or a part of ours that is
    not what it must be.

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
    plain, as_written = (OmegaConf.to_container(each, resolve=False) for each in (config, main_file))
    for group in groups:
        if plain.get(group) is not None and not isinstance(plain[group], dict):
            raise InputError(f"{group} must be one of its choices, got {plain[group]!r}")
    for node in sorted(NOT_OPTIONS - {"defaults", "hydra"}):
        if plain.get(node) != as_written.get(node):
            raise InputError(f"{node} is made of the other options, and is none itself: leave it out")
    for key in known:  # also parts that are no group, as analyze's
        if isinstance(plain.get(key), dict):
            check_arguments(config[key], key)


def check_arguments(node: DictConfig, path: str) -> None:
    """Refuse what the class or function behind a part of the configuration does not take: some are called hours later.

    Args:
        node: the part.
        path: its dotted key.

    Raises:
        InputError: there is an argument too many, or a value in the place of a part.
    """
    plain = OmegaConf.to_container(node, resolve=False)
    if "_target_" in plain:
        try:
            target = resolve_name(node["_target_"])
            parameters = inspect.signature(target).parameters
            hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
        except Exception as error:  # of whatever module it names
            raise InputError(f"{path}._target_ cannot be used: {one_line(error)}") from None
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for key in () if takes_any else plain:
            if not key.startswith("_") and key not in parameters:
                raise InputError(f"unknown option '{path}.{key}': it must be one of {', '.join(parameters)}")
        for key in hints.keys() & plain.keys():
            value = node[key]
            needed = value is None and NoneType not in get_args(hints[key])
            if is_part(hints[key]) and (needed or isinstance(value, str | bytes | int | float)):
                raise InputError(f"{path}.{key} is no value but a part of the configuration, got {value!r}")
    for key, value in plain.items():
        if isinstance(value, dict):
            check_arguments(node[key], f"{path}.{key}")


def is_part(hint: object) -> bool:
    """Return whether a parameter takes only objects that `_target_` makes: of classes of ours or torch's, or functions.

    Example:
        >>> from cbq.reconstruction.scaling import LearnedScaling
        >>> is_part(LearnedScaling | None), is_part(Callable[[int], int]), is_part(int | None), is_part(Path)
        (True, True, False, False)
    """
    kinds = set(get_args(hint) if isinstance(hint, UnionType) else (hint,)) - {NoneType}
    return bool(kinds) and all(
        get_origin(kind) is Callable or getattr(kind, "__module__", "").partition(".")[0] in ("cbq", "torch")
        for kind in kinds
    )


def check_combination(config: DictConfig, typed: Sequence[str]) -> None:
    """Refuse an option that the user typed and nothing reads, as the rounding of a method that learns none.

    Beside `experiment=` nothing is refused: there an option is for those cells of a table that have a use for it.

    Args:
        config: the composed configuration.
        typed: the command line.

    Raises:
        InputError: there is one.
    """
    groups = [re.split(r"[=.@]", word.lstrip("+~"))[0] for word in typed]
    if "experiment" in groups:
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
            chosen = f"method={config.method.name}" if "method" in groups else "the other options"
            raise InputError(f"{group} means nothing with {chosen}: leave it out")


def unpin_(config: DictConfig, typed: Sequence[str]) -> None:
    """Leave out the commit that a choice of `model` pins where another model is typed beside it.

    Args:
        config: the composed configuration.
        typed: the command line.
    """
    keys = {word.partition("=")[0].lstrip("+") for word in typed}
    model = config.get("model")
    if "model.path" in keys and "model.revision" not in keys and OmegaConf.is_config(model) and "revision" in model:
        model.revision = None


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


def quote(text: str) -> str:
    """Return a text that hydra takes for one value, and nothing in it for an interpolation.

    Example:
        >>> print(quote("it's ${x}"))
        'it\\'s \\${x}'
    """
    # Hydra takes a backslash for itself, unless it stands before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return "'" + escaped.replace("${", "\\${") + "'"
