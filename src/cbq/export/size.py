"""What an export takes on disk."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import nn

MIB = 2**20


@dataclass(frozen=True)
class Size:
    """Bytes of the weights that are quantized, biases not counted.

    Args:
        bytes: integers, scales, zero points and shapes, as they are stored.
        bf16_bytes: of the same weights in bfloat16.
        folder_bytes: of all tensors of the folder, embeddings and norms included.

    Example:
        >>> print(Size(bytes=26, bf16_bytes=100, folder_bytes=2**20))
        quantized weights take 0.260 of their size in bfloat16; all tensors 1.0 MiB
    """

    bytes: int
    bf16_bytes: int
    folder_bytes: int

    def __str__(self) -> str:
        return (
            f"quantized weights take {self.bytes / self.bf16_bytes:.3f} of their size in bfloat16; "
            f"all tensors {self.folder_bytes / MIB:.1f} MiB"
        )


def measure(folder: Path, model: nn.Module, linears: Iterable[str]) -> Size:
    """Return what the tensors of a folder take.

    Args:
        folder: of an export.
        model: that it was made of.
        linears: the names of its quantized linears.
    """
    linears = set(linears)
    quantized, everything = 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                everything += tensor.nbytes
                linear, _, part = name.rpartition(".")
                quantized += tensor.nbytes * (linear in linears and part != "bias")
    weights = sum(model.get_submodule(name).weight.numel() for name in linears)
    return Size(quantized, 2 * weights, everything)
