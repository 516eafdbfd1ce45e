"""A model with outliers put in: what makes large language models hard to quantize, on one that a laptop runs.

The scaled model computes what the original does, so that whatever its quantization loses more is due to outliers.

Shapes: T tokens, I in_features, C channels.
"""

import torch
from torch import nn

from cbq.errors import InputError, check_number, check_seed
from cbq.models.equivalent import producer_maxima, scale_channels_
from cbq.models.families import scaling_pairs
from cbq.models.loading import LoadedModel, embedded_folder, load_embedded

SAMPLE_CHARACTERS = 8000  # of the calibration text, to see which channels are rarely large


def load_with_outliers(
    name: str = "pico",
    dtype: str = "auto",
    prompt: str = "    def __init__(self",
    factor: float = 20.0,
    num_channels: int = 1,
    num_spikes: int = 1,
    seed: int = 0,
) -> LoadedModel:
    """Load an embedded model, enlarge a few channels of every block's activations, and shrink what reads them.

    Args:
        name: the model's folder in the package.
        dtype: as in `load_pretrained`.
        prompt: the start of the sample texts.
        factor: how many times larger the channels get. A power of 2 would leave every bit of the logits as it was.
        num_channels: channels that become large for every token, of each norm, of the values and of the down
            projection's input.
        num_spikes: further such channels that are large for a few tokens only: those whose largest value exceeds
            their mean size the most.
        seed: of the choice of channels.

    Raises:
        InputError: there is no such model in the package, the dtype is unknown, or a number is out of range.
    """
    check_number("model.factor", factor, least=1)
    check_seed("model.seed", seed)
    for key, value in {"num_channels": num_channels, "num_spikes": num_spikes}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"model.{key} must be an integer of at least 0, got {value!r}")
    loaded = load_embedded(name, dtype, prompt)
    loaded.name = f"{name}_outliers"
    generator = torch.Generator().manual_seed(seed)
    text = (embedded_folder(name) / "calibration.txt").read_text(encoding="utf-8")[:SAMPLE_CHARACTERS]
    ids = loaded.tokenizer(text, truncation=True, max_length=loaded.context, return_tensors="pt").input_ids
    peakedness = input_peakedness(loaded, ids)
    for block in loaded.blocks:
        for pair in scaling_pairs(loaded.model.config, block):
            consumer = block.get_submodule(pair.consumers[0])
            peaks = producer_maxima(pair, block, peakedness[consumer])
            channels = torch.randperm(len(peaks), generator=generator)[:num_channels]
            scale = torch.ones_like(peaks)
            scale[torch.cat([channels, peaks.topk(min(num_spikes, len(peaks))).indices])] = 1 / factor
            scale_channels_(pair, block, scale)
    return loaded


@torch.no_grad()
def input_peakedness(loaded: LoadedModel, segment: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    """Return, for each linear of the blocks, max|x| / mean|x| over tokens of each input feature, (I,).

    Args:
        loaded: the model.
        segment: token ids, (1, T).
    """
    peakedness: dict[nn.Module, torch.Tensor] = {}

    def remember(linear: nn.Module, args: tuple) -> None:
        sizes = args[0].float().abs().flatten(0, -2)
        peakedness[linear] = sizes.amax(0) / sizes.mean(0).clamp_min(torch.finfo(torch.float32).tiny)

    linears = [module for module in loaded.blocks.modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_pre_hook(remember) for linear in linears]
    try:
        loaded.model(input_ids=segment, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return peakedness
