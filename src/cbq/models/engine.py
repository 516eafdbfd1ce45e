"""A quantized folder as transformers loads it: what a user of it gets, which an export is compared with."""

import contextlib
import io
import json
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from cbq.errors import InputError, one_line
from cbq.models.checks import check_complete, check_finite, check_size, check_vocabulary
from cbq.models.families import context
from cbq.models.files import check_weights, find_trap, weight_format
from cbq.models.loading import LoadedModel, quiet_transformers, read_config, read_tokenizer
from cbq.models.positions import count_positions_


@torch.no_grad()
def load_quantized(
    folder: Path, device: torch.device, dtype: str | torch.dtype = "auto", dequantize: bool = False
) -> PreTrainedModel:
    """Return the model of a folder that is quantized in any way that transformers reads, in evaluation mode.

    Args:
        folder: a Hugging Face folder whose config.json has a quantization_config.
        device: to load it to.
        dtype: of what is not quantized, and of what is computed; `auto` is that of the folder.
        dequantize: let compressed-tensors unpack the weights while they are read.

    Raises:
        InputError: parameters are missing: transformers would make random ones.
    """
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    # The libraries print progress bars for every step, the last one at the first forward.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dequantize is said beside what the folder says, as it must be
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,  # left out, it would ask on a terminal
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
            **options,
        )
        check_complete(folder, model.config, info)
        count_positions_(model)
        model.eval().to(device)
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    return model


def load_as_it_is(folder: Path, dtype: str = "auto") -> LoadedModel:
    """Load a model folder to measure it, not to quantize it: of any architecture, and quantized already or not.

    Args:
        folder: what transformers loads.
        dtype: of what is not quantized; `auto` is the folder's own, but float32 without a GPU.

    Raises:
        InputError: it cannot be loaded.
    """
    if dtype == "auto" and not torch.cuda.is_available():
        dtype = "float32"
    if trap := find_trap(folder):
        raise InputError(f"model folder {folder} {trap}")
    with quiet_transformers():
        tokenizer = read_tokenizer(folder, trust_remote_code=False)
    if (folder / "config.json").is_file() and weight_format(folder):  # else transformers says what is wrong
        num_bytes = check_weights(folder, full_precision=False)
        with quiet_transformers():
            check_size(folder, read_config(folder, trust_remote_code=False), num_bytes)
    try:
        model = load_quantized(folder, torch.device("cpu"), dtype, dequantize=has_packed_zero_points(folder))
    except InputError:
        raise
    except Exception as error:  # each format of quantized weights has its own library, with errors of its own
        raise InputError(f"transformers cannot load the model in {folder}: {one_line(error)}") from error
    config = model.config.get_text_config()  # of a model of images too
    check_vocabulary(folder, tokenizer, config)
    check_finite(folder, model)
    name = folder.resolve().name
    return LoadedModel(name, model.requires_grad_(False), tokenizer, context(config), prompt="The")


def has_packed_zero_points(folder: Path) -> bool:
    """Return whether compressed-tensors reads a folder's weights only while it unpacks them."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
        groups = config.get("config_groups", {}).values()
        packed = [group for group in groups if "pack" in (group.get("format") or config.get("format", ""))]
        return any(not group["weights"]["symmetric"] for group in packed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
