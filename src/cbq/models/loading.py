"""A model with its tokenizer: the embedded one, a local folder, or a hub id. The only door to transformers.

Whatever is wrong with the files is one `InputError` before any work is done: transformers itself would fill in missing
parameters with random numbers and go on.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cbq.errors import InputError, check_flag, check_text, expanded, is_folder, one_line
from cbq.hub import fetch_snapshot
from cbq.models.checks import check_complete, check_config, check_finite, check_size, check_vocabulary
from cbq.models.families import context, get_blocks, supported_types
from cbq.models.files import (
    ACTIVATIONS_KEY,
    HUB_PATTERNS,
    PICKLE,
    SAFETENSORS,
    check_weights,
    find_defect,
    find_trap,
    weight_format,
)
from cbq.models.positions import count_positions_

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class LoadedModel:
    """A causal language model, ready to be quantized: in eval mode, without gradients.

    Args:
        name: how results call it.
        model: the model.
        tokenizer: its tokenizer.
        context: the most tokens that the model was made for.
        prompt: the start of the sample texts.
        revision: the commit of the hub that its files are of; None: they are not from the hub.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: int
    prompt: str
    revision: str | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks, in order."""
        return get_blocks(self.model)


def embedded_folder(name: str) -> Path:
    """Return the folder of a model that the package ships."""
    return Path(__file__).resolve().parents[1] / name


def load_embedded(name: str = "pico", dtype: str = "auto", prompt: str = "    def __init__(self") -> LoadedModel:
    """Load a model that the package ships: no network, no other file.

    Args:
        name: the model's folder in the package.
        dtype: as in `load_pretrained`.
        prompt: the start of the sample texts.

    Raises:
        InputError: there is no such model in the package, the dtype is unknown, or a text is none.
    """
    check_text("model.name", name)
    if not (embedded_folder(name) / "config.json").is_file():
        raise InputError(f"the package ships no model {name!r}; it ships 'pico'")
    return _load_folder(embedded_folder(name), name, dtype, False, prompt)


def load_pretrained(
    path: str,
    name: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    prompt: str = "The",
) -> LoadedModel:
    """Load a model from a local folder or from the hub.

    Args:
        path: a local folder, or a hub id such as `huggyllama/llama-7b`. What the hub cache has is not asked for again.
        name: how results call it; the folder's name or the hub id if None.
        revision: a branch, tag or commit of the hub id; the main branch if None. Of a local folder it means nothing.
        dtype: `auto` (the checkpoint's own, but float32 without a GPU), `float32`, `bfloat16` or `float16`.
        trust_remote_code: run Python code that comes with the checkpoint.
        prompt: the start of the sample texts.

    Raises:
        InputError: no such folder; not on the hub, or no way to ask; a file is missing or corrupt; the architecture
            is not supported; parameters or token ids do not fit the configuration; an unknown dtype; a text is none.
    """
    check_text("model.path", path)
    check_text("model.name", name, optional=True)
    check_text("model.revision", revision, optional=True)
    check_flag("model.trust_remote_code", trust_remote_code)
    folder = expanded(path)
    if is_folder(folder):
        return _load_folder(folder, results_name(path, name), dtype, trust_remote_code, prompt)
    if _looks_local(path):
        raise InputError(f"model path {path!r} is not a folder; give a folder or a hub id such as huggyllama/llama-7b")
    patterns = [*HUB_PATTERNS, *(["*.py"] if trust_remote_code else [])]
    folder = fetch_snapshot(path, patterns, is_complete=lambda cached: find_defect(cached) is None, revision=revision)
    if weight_format(folder) is not SAFETENSORS:  # as of OPT, whose list of pickles may be here
        patterns.append(PICKLE.pattern)
        folder = fetch_snapshot(path, patterns, lambda cached: find_defect(cached) is None, revision=revision)
    loaded = _load_folder(folder, results_name(path, name), dtype, trust_remote_code, prompt)
    loaded.revision = folder.name
    return loaded


def results_name(path: str, name: str | None = None) -> str:
    """Return how results call a model: by its name, its folder's name or its hub id."""
    folder = expanded(path)
    return name or (folder.resolve().name if is_folder(folder) else path)


def _looks_local(path: str) -> bool:
    """Return whether a path that is no folder was meant as one, rather than as a hub id.

    Example:
        >>> [_looks_local(path) for path in ("/data/llama", "~/llama", "a/b/c", "huggyllama/llama-7b")]
        [True, True, True, False]
    """
    first = Path(path).parts[:1]
    return path.startswith(("/", "./", "../", "~")) or path.count("/") > 1 or Path(*first).exists()


def _load_folder(folder: Path, name: str, dtype: str, trust_remote_code: bool, prompt: str) -> LoadedModel:
    """Load a model and its tokenizer from a folder, and refuse what does not fit together."""
    check_text("model.prompt", prompt)
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if defect := find_defect(folder) or find_trap(folder):
        raise InputError(f"model folder {folder} {defect}")
    num_bytes = check_weights(folder, full_precision=True)
    with quiet_transformers():
        config = read_config(folder, trust_remote_code)
        check_config(folder, config)
        tokenizer = read_tokenizer(folder, trust_remote_code)
        check_vocabulary(folder, tokenizer, config)  # before the weights are read: seven billion of them take minutes
        if not (trust_remote_code and getattr(config, "auto_map", None)):  # else it is its own code that builds it
            check_size(folder, config, num_bytes)
        model = _read_model(folder, config, dtype, trust_remote_code)
    check_finite(folder, model)
    return LoadedModel(name, model.eval().requires_grad_(False), tokenizer, context(config), prompt)


def read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Read config.json, of any architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # a nonsensical value can raise anything in the class of a configuration
        raise InputError(
            f"{folder}/config.json describes no model ({one_line(error)}); supported: {', '.join(supported_types())}"
        ) from error
    if hasattr(config, ACTIVATIONS_KEY):
        delattr(config, ACTIVATIONS_KEY)  # it is of this folder, and of none that is written from the model
    return config


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model folder."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a corrupt file
        raise InputError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from error


def _read_model(folder: Path, config: PreTrainedConfig, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """Read the weights, all of which must be there, fit, and be used."""
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=weight_format(folder) is SAFETENSORS,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # only so that they are listed below instead of a page of text
                output_loading_info=True,
            )
    except Exception as error:  # whatever files of somebody else's make transformers raise
        raise InputError(f"transformers cannot load the model in {folder}: {one_line(error)}") from error
    check_complete(folder, config, info)
    count_positions_(model)
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing progress bars and load reports: what matters of them is an error here."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
