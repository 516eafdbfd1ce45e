"""A model whose scheme is changed in place, again and again, without loading it anew.

Shapes: O out_features, I in_features.
"""

from torch import nn

from cbq.quant.linear import QuantLinear
from cbq.quant.scheme import QuantScheme


def named_linears(blocks: nn.ModuleList) -> dict[str, QuantLinear]:
    """Return every quantizable linear by the name that `quant.overrides` know it by: `blocks.0.mlp.down_proj`."""
    return {
        f"blocks.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, QuantLinear)
    }


def all_names(name: str, num_blocks: int) -> list[str]:
    """Return what a linear is called: by its block counted from the first one, and from the last.

    Example:
        >>> all_names("blocks.1.mlp.down_proj", num_blocks=8)
        ['blocks.1.mlp.down_proj', 'blocks.-7.mlp.down_proj']
    """
    _, index, inner = name.split(".", 2)
    return [name, f"blocks.{int(index) - num_blocks}.{inner}"]


def set_scheme_(blocks: nn.ModuleList, scheme: QuantScheme) -> None:
    """Give every quantizable linear the quantizers of another scheme, none of them learned; its weight is shared.

    Args:
        blocks: of a model after `make_quantizable_`. The linears end in the full-precision state.
        scheme: with its overrides.
    """
    for name, linear in named_linears(blocks).items():
        _, index, inner = name.split(".", 2)
        found = scheme.of_linear(all_names(name, len(blocks)))
        blocks[int(index)].set_submodule(inner, QuantLinear(linear, found))


def effective_bits(blocks: nn.ModuleList) -> float:
    """Return the bits stored a weight of the blocks' linears, as results count them: with scales and zero points."""
    linears = named_linears(blocks).values()
    bits = sum(linear.scheme.stored_bits(linear.out_features, linear.in_features) for linear in linears)
    return bits / sum(linear.weight.numel() for linear in linears)
