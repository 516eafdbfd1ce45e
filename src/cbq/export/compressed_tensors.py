"""compressed-tensors: what vLLM and transformers read, by the library that defines it.

For each quantized linear `X`: `pack-quantized` has `X.weight_packed` int32 (O, ceil(I * bits / 32)), `X.weight_shape`
int64 (2,), `X.weight_scale` (O, G) and, asymmetric, `X.weight_zero_point` int32 (ceil(O * bits / 32), G);
`int-quantized` has `X.weight` int8 (O, I), `X.weight_scale` (O, G) and, asymmetric, `X.weight_zero_point` int8 (O, G).
Static activations add `X.input_scale` (1,) and `X.input_zero_point` int8 (1,). Integers and zero points are signed
here: those of cbq less 2^(bits - 1).

Shapes: O out_features, I in_features, G groups a row.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme, QuantizationStatus
from torch import nn

from cbq.errors import InputError
from cbq.export.formats import Format, quantized_schemes, signed
from cbq.models.engine import load_quantized
from cbq.models.loading import PreTrainedModel
from cbq.quant.linear import FusedLinear, QuantLinear
from cbq.quant.scheme import FULL_PRECISION_BITS, QuantScheme

PACKED, UNPACKED = "pack-quantized", "int-quantized"
MIXED = "mixed-precision"
INTEGER_KERNELS = ((8, 8), (4, 8))  # bits of weights and activations for which vLLM multiplies integers


def layout(scheme: QuantScheme) -> str:
    """Return how a linear's integers are stored.

    Packed, except where a reader needs it otherwise: vLLM's kernels for integer activations read one byte an integer,
    and transformers reads packed zero points only where it drops the quantization of activations.

    Example:
        >>> [layout(QuantScheme(*bits, symmetric=True)) for bits in ((4, 16), (4, 4), (8, 8))]
        ['pack-quantized', 'pack-quantized', 'int-quantized']
    """
    kernel = scheme.group_size == -1 and (scheme.weight_bits, scheme.act_bits) in INTEGER_KERNELS
    return UNPACKED if scheme.quantizes_activations and (kernel or not scheme.symmetric) else PACKED


def weight_arguments(scheme: QuantScheme) -> QuantizationArgs:
    """Return what the library calls the quantization of a linear's weight."""
    grouped = scheme.group_size != -1
    return QuantizationArgs(
        num_bits=scheme.weight_bits,
        symmetric=scheme.symmetric,
        strategy="group" if grouped else "channel",
        group_size=scheme.group_size if grouped else None,
    )


def act_arguments(scheme: QuantScheme) -> QuantizationArgs | None:
    """Return what the library calls the quantization of a linear's input, or None."""
    if not scheme.quantizes_activations:
        return None
    return QuantizationArgs(
        num_bits=scheme.act_bits,
        symmetric=scheme.act_symmetric,
        strategy=scheme.act_granularity,
        dynamic=scheme.act_granularity == "token",
    )


class CompressedTensors(Format):
    """The format of vLLM and of transformers."""

    name = "compressed_tensors"
    engine = "transformers"

    def check_linear(self, name: str, linear: QuantLinear | FusedLinear) -> None:
        if not linear.scheme.quantizes_weights:
            raise InputError(
                f"export={self.name}: {name} has quantized activations and full-precision weights, which no engine "
                f"computes: quant.weight_bits=8, or quant.act_bits={FULL_PRECISION_BITS}"
            )

    def check(self, model: PreTrainedModel, act_ranges_change: bool = False) -> None:
        super().check(model, act_ranges_change)
        schemes = quantized_schemes(model)
        if needs_dequantize(schemes) and any(scheme.quantizes_activations for scheme in schemes.values()):
            raise InputError(
                f"export={self.name}: of weights that are quantized alone transformers reads zero points only where it "
                "drops all quantization of activations: quant.symmetric=true"
            )

    def tensors(self, linear: FusedLinear) -> dict[str, torch.Tensor]:
        scheme = linear.scheme
        integers = signed(linear.integers, scheme.weight_bits)
        zero_point = signed(linear.zero_point, scheme.weight_bits)
        # In float32 whatever its values fit in: readers multiply in the type of the scale.
        found = {"weight_scale": linear.weight_scale}
        if layout(scheme) == PACKED:
            found["weight_packed"] = pack_to_int32(integers, scheme.weight_bits)
            found["weight_shape"] = torch.tensor(integers.shape)
            zero_point = pack_to_int32(zero_point, scheme.weight_bits, packed_dim=0)
        else:
            found["weight"] = integers
        if not scheme.symmetric:
            found["weight_zero_point"] = zero_point
        if scheme.quantizes_activations and scheme.act_granularity == "tensor":
            scale, zero_point = linear.act_quantizer.learned_qparams()
            found["input_scale"] = scale.view(1)
            found["input_zero_point"] = zero_point.view(1).to(torch.int8)
        return found

    def quantization_config(self, schemes: Mapping[str, QuantScheme], others: list[str]) -> dict:
        groups: dict[tuple, QuantizationScheme] = {}
        for name, scheme in schemes.items():
            key = tuple(repr(each) for each in (weight_arguments(scheme), act_arguments(scheme)))
            if key not in groups:
                groups[key] = QuantizationScheme(
                    targets=[],
                    weights=weight_arguments(scheme),
                    input_activations=act_arguments(scheme),
                    format=layout(scheme),
                )
            groups[key].targets.append(name)
        if len(groups) == 1:
            next(iter(groups.values())).targets = ["Linear"]
        layouts = {layout(scheme) for scheme in schemes.values()}
        config = QuantizationConfig(
            config_groups={f"group_{number}": group for number, group in enumerate(groups.values())},
            format=MIXED if len(layouts) > 1 else layouts.pop(),
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=others,
        )
        return config.to_dict()

    def is_exact(self, schemes: Mapping[str, QuantScheme]) -> bool:
        with_activations = [scheme for scheme in schemes.values() if scheme.quantizes_activations]
        return all(scheme.act_symmetric or scheme.engine_activations for scheme in with_activations) and not any(
            map(divides_otherwise, with_activations)
        )

    def is_installed(self) -> bool:
        return True  # cbq itself needs it

    def load_engine(self, folder: Path, schemes: Mapping[str, QuantScheme], device: torch.device) -> nn.Module:
        return load_quantized(folder, device, dequantize=needs_dequantize(schemes))

    def loading(self, schemes: Mapping[str, QuantScheme]) -> list[str]:
        option = ", quantization_config=CompressedTensorsConfig(dequantize=True)" * needs_dequantize(schemes)
        names = "AutoModelForCausalLM" + ", CompressedTensorsConfig" * needs_dequantize(schemes)
        return [
            "With transformers and compressed-tensors 0.20 (`pip install transformers compressed-tensors`):",
            "",
            "```python",
            f"from transformers import {names}",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("<this folder>"{option})',
            "```",
            "",
            "With vLLM, where it has kernels for the scheme (docs/export.md of cbq):",
            "",
            "```",
            "vllm serve <this folder> --dtype bfloat16",
            "```",
        ]

    def notes(self, schemes: Mapping[str, QuantScheme]) -> list[str]:
        notes = []
        with_activations = [scheme for scheme in schemes.values() if scheme.quantizes_activations]
        if any(layout(scheme) == PACKED for scheme in with_activations):
            notes.append(
                "vLLM's CPU build silently ignores the quantization of activations of a pack-quantized checkpoint: it "
                "computes with the quantized weights alone. transformers simulates it."
            )
        if any(layout(scheme) == UNPACKED and not scheme.symmetric for scheme in with_activations):
            notes.append("The weights have zero points and are stored in one byte each; vLLM refuses them.")
        if with_activations:
            notes.append(
                "transformers drops the quantization of activations with CompressedTensorsConfig(dequantize=True)."
            )
        if any(map(divides_otherwise, with_activations)):
            notes.append(
                "Activations are absmax / (2^(b - 1) - 1) steps, as vLLM computes them; transformers divides by "
                "2^(b - 1) - 0.5 and so computes something a little else."
            )
        if needs_dequantize(schemes):
            notes.append(
                "The weights have packed zero points, which transformers reads only with "
                "quantization_config=CompressedTensorsConfig(dequantize=True); vLLM's CPU build runs those of 4 bits."
            )
        return notes


def divides_otherwise(scheme: QuantScheme) -> bool:
    """Return whether the library finds another step size for each token than cbq did."""
    default = scheme.act_denominator in (None, 2 ** (scheme.act_bits - 1) - 0.5)
    return scheme.act_granularity == "token" and not default


def needs_dequantize(schemes: Mapping[str, QuantScheme]) -> bool:
    """Return whether transformers reads the weights only with its option `dequantize`: packed zero points."""
    return any(layout(scheme) == PACKED and not scheme.symmetric for scheme in schemes.values())
