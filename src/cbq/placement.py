"""Where a model's weights are while it computes: on its device, or in host memory but for the blocks at work."""

import torch

from cbq.errors import InputError
from cbq.models.families import get_blocks
from cbq.models.loading import PreTrainedModel
from cbq.models.offload import offload_
from cbq.quant.linear import quant_linears
from cbq.streams.memory import GIB, free_device_bytes

RESIDENT_SHARE = 0.6  # of the device's free memory, how much a model may take: a window and its batches need the rest
OFFLOAD = ("auto", True, False)


def check_offload(offload: bool | str) -> None:
    """Refuse what is no choice.

    Raises:
        InputError: neither auto nor a truth value.
    """
    if not isinstance(offload, bool) and offload != "auto":
        raise InputError(f"offload must be auto, true or false, got {offload!r}")


def place_(model: PreTrainedModel, device: torch.device, offload: bool | str = "auto") -> bool:
    """Bring a model to its device, the whole of it or its blocks only while they compute.

    Args:
        model: in host memory.
        device: where it computes; where that is the host, nothing is to be done.
        offload: keep the blocks in host memory; auto: where the model, with the integers that its quantized linears
            will have, would take more than `RESIDENT_SHARE` of the device's free memory.

    Returns:
        whether the blocks are kept in host memory.

    Raises:
        InputError: they should be, of a model that is of no family of the table.
    """
    if device.type == "cpu":
        return False
    if offload == "auto":
        offload = not fits(model, device)
    if offload:
        offload_(model, get_blocks(model), device)
    else:
        model.to(device)
    return offload


def fits(model: PreTrainedModel, device: torch.device) -> bool:
    """Return whether the whole of a model can be on a device, finished too, with room for what computes with it."""
    torch.cuda.empty_cache()  # what an earlier run of this process has given back is not free to the device
    return finished_bytes(model) <= RESIDENT_SHARE * free_device_bytes(device)


def check_fits(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse a model that is too large for its device, for work that needs the whole of it there.

    Raises:
        InputError: it is.
    """
    if device.type != "cpu" and not fits(model, device):
        raise InputError(
            f"the model takes {finished_bytes(model) / GIB:.3g} GiB, which must be at most {RESIDENT_SHARE} of the "
            f"{free_device_bytes(device) / GIB:.3g} GiB that are free on the device: a smaller model or dtype, or "
            "CUDA_VISIBLE_DEVICES= for the host"
        )


def finished_bytes(model: PreTrainedModel) -> int:
    """Return how large a model is when its quantized linears have their integers, a byte a weight."""
    quantized = (linear for linear in quant_linears(model) if linear.weight_quantizer is not None)
    return model_bytes(model) + sum(linear.weight.numel() for linear in quantized)


def model_bytes(model: PreTrainedModel) -> int:
    """Return how large a model's parameters and buffers are."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
