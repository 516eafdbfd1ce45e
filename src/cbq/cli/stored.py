"""Configurations that a run folder holds. The folder may come from somebody else: nothing in them is simply done."""

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cbq.cli.options import conf_dir
from cbq.errors import InputError, one_line


def stored_group(file: Path, group: str) -> DictConfig:
    """Return one group of a stored configuration, that it is safe to instantiate.

    Args:
        file: the `config.yaml` of a run.
        group: such as `model`.

    Raises:
        InputError: the file cannot be read, or the group names code that is not behind any of its choices, asks to run
            code that comes with a model, or is computed from something else, such as an environment variable.
    """
    try:
        config = OmegaConf.load(file)
        plain = OmegaConf.to_container(config, resolve=False)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}") from None
    node = plain.get(group) if isinstance(plain, dict) else None
    if not isinstance(node, dict) or "_target_" not in node:
        raise InputError(f"{file} does not say which {group} it was")
    allowed = {OmegaConf.load(choice).get("_target_") for choice in (Path(conf_dir()) / group).glob("*.yaml")}
    for key, value in leaves(node):
        if key == "_target_" and (value not in allowed or node["_target_"] != value):
            raise InputError(f"{file} names code to run as its {group}, {value!r}: it is not done")
        if key == "trust_remote_code" and value:
            raise InputError(f"{file} asks to run code that comes with its {group}: it is not done")
        if isinstance(value, str) and "${" in value:
            raise InputError(f"{file} computes {group}.{key} from {value!r}: it is not done")
    return config[group]


def leaves(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value below a plain configuration, with the key that it stands under."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield key, node
        return
    for name, child in children:
        yield from leaves(child, name if isinstance(name, str) else key)
