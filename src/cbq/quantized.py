"""A model made ready for quantization: what is put into it, before anything is learned."""

from torch import nn

from cbq.errors import InputError
from cbq.models.attention import check_attention, hook_attention_
from cbq.models.linears import to_linears_
from cbq.models.loading import PreTrainedModel
from cbq.quant.attention import quantize_qkv_
from cbq.quant.linear import quantize_linears_
from cbq.quant.scheme import QuantScheme


def make_quantizable_(model: PreTrainedModel, blocks: nn.ModuleList, scheme: QuantScheme) -> None:
    """Put what `scheme` quantizes into the blocks, in the full-precision state: the model computes what it did.

    Args:
        model: of a supported family, in full precision.
        blocks: its blocks.
        scheme: what to quantize to how many bits.

    Raises:
        InputError: the scheme does not fit the model, which is then unchanged.
    """
    if scheme.quantizes_qkv:
        check_attention(model)
    undo = to_linears_(model)
    try:
        quantize_linears_(blocks, scheme)
    except InputError:
        undo()
        raise
    if scheme.quantizes_qkv:
        quantize_qkv_(hook_attention_(model), scheme)
