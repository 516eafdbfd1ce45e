"""A quantized folder as transformers loads it: what a user of it gets, which an export is compared with."""

import contextlib
import io
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedModel

from cbq.models.loading import quiet_transformers


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
    """
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    # The libraries print progress bars for every step, the last one at the first forward.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dequantize is said beside what the folder says, as it must be
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **options)
        model.eval().to(device)
        model(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    return model
