"""Scaling a block's activations channel by channel, without changing what the block computes.

Shapes: C channels of a producer, I in_features of a consumer.
"""

import torch
from torch import nn

from cbq.models.pairs import ScalingPair


def channel_of_input(num_channels: int, in_features: int, head_dim: int) -> torch.Tensor:
    """Return which channel of the producer each input feature of a consumer is, (I,).

    They are the same but in grouped-query attention, where several query heads read one value head.

    Args:
        num_channels: C; divides I.
        in_features: I.
        head_dim: channels of a head.

    Example:
        >>> channel_of_input(num_channels=4, in_features=8, head_dim=2).tolist()
        [0, 1, 0, 1, 2, 3, 2, 3]
        >>> channel_of_input(num_channels=3, in_features=3, head_dim=2).tolist()
        [0, 1, 2]
    """
    if num_channels == in_features:
        return torch.arange(num_channels)
    assert in_features % num_channels == 0, f"{in_features} input features cannot share {num_channels} channels"
    heads = torch.arange(num_channels).view(-1, 1, head_dim)
    return heads.expand(-1, in_features // num_channels, -1).flatten()


def producer_maxima(pair: ScalingPair, block: nn.Module, input_maxima: torch.Tensor) -> torch.Tensor:
    """Return the largest |x| of each channel of the pair's producer, (C,).

    Args:
        pair: which modules.
        block: has them.
        input_maxima: the largest |x| of each input feature of its consumers, (I,).
    """
    num_rows = len(block.get_submodule(pair.producer).weight)
    num_channels = num_rows if pair.rows is None else len(pair.rows)
    channels = channel_of_input(num_channels, len(input_maxima), pair.head_dim).to(input_maxima.device)
    return input_maxima.new_zeros(num_channels).scatter_reduce(0, channels, input_maxima, "amax")


def scale_rows(pair: ScalingPair, rows: torch.Tensor, channel_scale: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    """Return a producer's parameter with the rows that are channels divided by their scale.

    Args:
        pair: which rows are.
        rows: (R,) or (R, any).
        channel_scale: (C,).
        offset: what is added to the parameter before it is used.
    """
    if pair.rows is not None:
        index = pair.rows.to(channel_scale.device)
        channel_scale = channel_scale.new_ones(len(rows)).index_copy(0, index, channel_scale)
    return (rows.float() + offset) / channel_scale.view(-1, *[1] * (rows.dim() - 1)) - offset


def scale_columns(
    pair: ScalingPair, columns: torch.Tensor, channel_scale: torch.Tensor, in_features: int
) -> torch.Tensor:
    """Return the columns of a consumer's parameter, (any, I) or (any, 1), times their channel's scale, of (C,)."""
    channels = channel_of_input(len(channel_scale), in_features, pair.head_dim)
    return columns * channel_scale[channels.to(channel_scale.device)]


@torch.no_grad()
def scale_channels_(pair: ScalingPair, block: nn.Module, channel_scale: torch.Tensor) -> None:
    """Divide the producer's output channels by `channel_scale` (C,) and multiply its consumers' input features by it.

    The block computes the same, but for the rounding of its weights' dtype.

    Args:
        pair: which modules.
        block: has them.
        channel_scale: finite and not 0; positive where a ReLU lies between producer and consumers.
    """
    for parameter in block.get_submodule(pair.producer).parameters(recurse=False):
        before = parameter.float() + pair.gain_offset
        parameter.copy_(scale_rows(pair, parameter, channel_scale, pair.gain_offset))
        if pair.gain_offset:  # 1 / s - 1 lies near -1, where a short dtype is coarse: what it makes of s counts
            after = parameter.float() + pair.gain_offset
            channel_scale = torch.where((before != 0) & (after != 0), before / after, channel_scale)
    for name in (*pair.consumers, *pair.others):
        weight = block.get_submodule(name).weight
        weight.copy_(scale_columns(pair, weight.float(), channel_scale, weight.shape[1]))


@torch.no_grad()
def shift_channels_(pair: ScalingPair, block: nn.Module, shift: torch.Tensor) -> None:
    """Subtract `shift` (C,) from the producer's output channels; its consumers' biases take what is missing.

    The block computes the same, but for rounding. The producer is a norm; it and its consumers must have biases.

    Args:
        pair: which modules.
        block: has them.
        shift: any values.
    """
    block.get_submodule(pair.producer).bias.sub_(shift)
    for name in pair.consumers:
        linear = block.get_submodule(name)
        linear.bias.add_((linear.weight.float() @ shift).to(linear.bias.dtype))
