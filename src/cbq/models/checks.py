"""Whether a model folder's files and its configuration fit together: asked before and after transformers reads them."""

import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from cbq.errors import InputError, one_line
from cbq.models.families import find_family, supported_types

NO_PARAMETERS = ("rotary_emb.inv_freq", ".masked_bias", ".g_idx")


def check_config(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a model that cannot be quantized.

    Raises:
        InputError: its architecture is none of the table's, its weights are quantized already, or it reads them past
            its linears.
    """
    find_family(config)
    if getattr(config, "quantization_config", None):
        raise InputError(f"the model in {folder} is quantized already; give the full-precision checkpoint")
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise InputError(
            f"{folder}/config.json says slow_but_exact, where transformers reads weights past the linears that hold "
            "them: set it to false"
        )


def check_size(folder: Path, config: PreTrainedConfig, num_bytes: int) -> None:
    """Refuse a configuration of a model much larger than what is there: transformers would make up the rest.

    Args:
        folder: the model's.
        config: the model's, which no code but transformers' own builds.
        num_bytes: that hold its weights, quantized or not.

    Raises:
        InputError: there is less than a bit for each of its parameters; or its sizes are none.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused later
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # sizes that are none or do not fit each other fail anywhere
        raise InputError(f"{folder}/config.json describes no model ({one_line(error)})") from error
    count = sum(parameter.numel() for parameter in skeleton.parameters())
    if count > 8 * num_bytes:
        raise InputError(
            f"{folder}/config.json describes a model of {count:.4g} parameters, and the files of its weights have "
            f"{num_bytes} bytes"
        )


def check_vocabulary(folder: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    Raises:
        InputError: it has some, or no ids at all.
    """
    # Added tokens may lie beyond: Gemma 3's stands for an image, which its text model never sees.
    added = tokenizer.get_added_vocab()
    largest = max((index for token, index in tokenizer.get_vocab().items() if token not in added), default=-1)
    if not 0 <= largest < config.vocab_size:
        raise InputError(
            f"tokenizer of {folder} has ids up to {largest}, but the model's vocabulary has {config.vocab_size} ids"
        )


def check_complete(folder: Path, config: PreTrainedConfig, info: dict) -> None:
    """Refuse a checkpoint some of whose parameters are missing, do not fit, or are of blocks that are not there.

    Args:
        folder: its folder.
        config: the model's.
        info: what transformers says of the loading.

    Raises:
        InputError: there are some.
    """
    # Parameters of a block that nothing uses (biases, more blocks) mean that config.json describes another model.
    # Position tables of old LLaMA checkpoints and masks of old GPT-2 ones are no parameters, nor is the order of inputs
    # in the layout of GPTQ: AutoRound does not read it, and refuses any but the plain one.
    known = config.model_type in supported_types()
    blocks = (find_family(config).blocks if known else "") + "."
    unexpected = [key for key in info["unexpected_keys"] if not key.endswith(NO_PARAMETERS)]
    for problem, keys in (
        ("lacks parameters", info["missing_keys"]),
        ("has parameters of a wrong shape", [str(mismatch[0]) for mismatch in info["mismatched_keys"]]),
        ("has parameters that config.json has no place for", [key for key in unexpected if key.startswith(blocks)]),
    ):
        names = sorted(keys)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"the checkpoint in {folder} {problem}: {', '.join(names[:3])}{more}")


def check_finite(folder: Path, model: nn.Module) -> None:
    """Refuse a model with parameters that are no numbers: everything computed from them would be none either.

    Raises:
        InputError: there is one, in the checkpoint or in the type that it was asked for in.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            values = parameter.detach()
            if values.dtype.itemsize == 1:
                values = values.float()  # torch has no extremes of 8 bits
            ends = torch.stack(torch.aminmax(values))  # which makes nothing of the parameter's size
            if not ends.isfinite().all():
                dtype = str(parameter.dtype).removeprefix("torch.")
                raise InputError(
                    f"the checkpoint in {folder} holds values that are not finite, or too large for {dtype}: {name}"
                )
