"""The layout of GPTQ, which GPTQModel and AutoRound read: weights alone.

For each quantized linear `X`: `X.qweight` int32 (I * bits / 32, O), a stream of bits along the inputs; `X.qzeros`
int32 (G, O * bits / 32), likewise along the outputs; `X.scales` float16 (G, O); `X.g_idx` int32 (I,), the group of each
input. Integers and zero points are unsigned. The first version of the layout stores each zero point less 1, the second
as it is.

Shapes: O out_features, I in_features, G groups a row.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import nn

from cbq.errors import InputError
from cbq.export.formats import Format, signed
from cbq.models.engine import load_quantized
from cbq.quant.linear import FusedLinear, QuantLinear
from cbq.quant.scheme import QuantScheme

BITS = (2, 3, 4, 8)
CPU_GROUPS = (32, 64, 128, 256)  # of 4 bits
WORD = 32  # bits of an integer that holds several


class GPTQ(Format):
    """GPTQModel's format. W4 needs groups: its CPU kernel takes no whole rows; `AutoRound` does."""

    name = "gptq"
    engine = "gptqmodel"
    package = "gptqmodel"

    def check_linear(self, name: str, linear: QuantLinear | FusedLinear) -> None:
        scheme = linear.scheme
        if scheme.quantizes_activations or scheme.weight_bits not in BITS:
            raise InputError(
                f"export={self.name}: {name} is {scheme.label}, and this layout has weights of "
                f"{', '.join(map(str, BITS))} bits and no activations: target=autoround keeps to it"
            )
        if scheme.scale_dtype != "float16":
            raise InputError(
                f"export={self.name}: scales are stored in float16, those of {name} are learned in "
                f"{scheme.scale_dtype}: target=autoround, or quant.scale_dtype=float16"
            )
        if linear.in_features % WORD or linear.out_features % WORD:
            raise InputError(
                f"export={self.name}: inputs and outputs must come in multiples of {WORD}, {name} has "
                f"{linear.in_features} and {linear.out_features}"
            )

    def tensors(self, linear: FusedLinear) -> dict[str, torch.Tensor]:
        bits, groups = linear.scheme.weight_bits, linear.weight_scale.shape[1]
        zero_point = linear.zero_point.to(torch.int16) - self.zero_point_offset(linear.scheme)
        inputs = torch.arange(linear.in_features, dtype=torch.int32, device=linear.weight.device)
        return {
            # The packer wants signed integers, and packs unsigned ones.
            "qweight": pack_to_int32(signed(linear.integers, bits), bits).T,
            "qzeros": pack_to_int32(signed(zero_point, bits), bits, packed_dim=0).T,
            "scales": linear.weight_scale.T.to(torch.float16),
            "g_idx": inputs // (linear.in_features // groups),
        }

    def zero_point_offset(self, scheme: QuantScheme) -> int:
        """Return what is taken off a zero point: asymmetric ones may be 0, and are stored in the second version."""
        return 1 if scheme.symmetric else 0

    def quantization_config(self, schemes: Mapping[str, QuantScheme], others: list[str]) -> dict:
        scheme = self.only_scheme(schemes, others)
        return {
            "quant_method": "gptq",
            "bits": scheme.weight_bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
            "pack_dtype": "int32",
        }

    def only_scheme(self, schemes: Mapping[str, QuantScheme], others: list[str]) -> QuantScheme:
        """Return the scheme of all linears of the blocks.

        Args:
            schemes: of the quantized linears, by name.
            others: the names of all other linears; the head is outside the blocks.

        Raises:
            InputError: there are several, or linears that are left in full precision.
        """
        different = {scheme.label + str(scheme.symmetric): scheme for scheme in schemes.values()}
        if len(different) > 1:
            labels = ", ".join(sorted({scheme.label for scheme in different.values()}))
            raise InputError(f"export={self.name} has one scheme for all linears, not {labels}: no quant.overrides")
        left = [name for name in others if block_list(name) in map(block_list, schemes)]
        if left:
            raise InputError(f"export={self.name} has one scheme for all linears of the blocks, and {left[0]} has none")
        return next(iter(different.values()))

    def is_exact(self, schemes: Mapping[str, QuantScheme]) -> bool:
        return False  # kernels of float16

    def is_installed(self) -> bool:
        return find_spec(self.package) is not None

    def load_engine(self, folder: Path, schemes: Mapping[str, QuantScheme], device: torch.device) -> nn.Module:
        return load_quantized(folder, device, dtype=torch.float16)

    def loading(self, schemes: Mapping[str, QuantScheme]) -> list[str]:
        return [
            f"With transformers and {self.engine} (`scripts/check_engine.py gptq` of cbq makes an environment for it):",
            "",
            "```python",
            "import torch",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype=torch.float16, device_map="auto")',
            "```",
        ]

    def notes(self, schemes: Mapping[str, QuantScheme]) -> list[str]:
        notes = ["Its kernels compute in float16: logits differ from those of cbq in their last digits."]
        refused = {scheme.label for scheme in schemes.values() if not self.runs_on_cpu(scheme)}
        if refused:
            notes.append(
                f"{self.engine}'s CPU kernel does not run {', '.join(sorted(refused))}: of 4 bits it takes groups of "
                f"{', '.join(map(str, CPU_GROUPS))}. quant.group_size=32, or export=autoround."
            )
        return notes

    def runs_on_cpu(self, scheme: QuantScheme) -> bool:
        """Return whether the engine has a CPU kernel for a linear's scheme, among those that the layout has."""
        return scheme.weight_bits != 4 or scheme.group_size in CPU_GROUPS


class AutoRound(GPTQ):
    """The same tensors, told to AutoRound, which loads W4 per channel too."""

    name = "autoround"
    engine = "auto-round"
    package = "auto_round"

    def runs_on_cpu(self, scheme: QuantScheme) -> bool:
        return True

    def quantization_config(self, schemes: Mapping[str, QuantScheme], others: list[str]) -> dict:
        scheme = self.only_scheme(schemes, others)
        blocks = set(map(block_list, schemes))
        return {
            "quant_method": "auto-round",
            "bits": scheme.weight_bits,
            "group_size": scheme.group_size,
            "sym": scheme.symmetric,
            "data_type": "int",
            "packing_format": "auto_round:auto_gptq" if scheme.symmetric else "auto_round:gptqmodel",
            "block_name_to_quantize": ",".join(sorted(blocks)),
            "autoround_version": "0.16.1",
        }


def block_list(name: str) -> str:
    """Return the name of the list of blocks that a linear is in, or all of its name.

    Example:
        >>> block_list("model.layers.0.mlp.up_proj"), block_list("lm_head")
        ('model.layers', 'lm_head')
    """
    return re.split(r"\.\d+\.", name)[0]
