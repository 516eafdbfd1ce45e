"""A checkpoint in the layout of an engine: the interface of every format, and what they share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from cbq.errors import InputError
from cbq.models.families import find_family
from cbq.models.files import SHARD_SIZE
from cbq.models.loading import PreTrainedModel, PreTrainedTokenizerBase, quiet_transformers
from cbq.quant.attention import qkv_quantizers
from cbq.quant.linear import FusedLinear, QuantLinear, fused_linears
from cbq.quant.scheme import QuantScheme

NOT_STORED = ("integers", "weight_scale", "zero_point")  # a fused linear's own buffers


class Format(ABC):
    """How an engine wants a quantized model.

    Attributes:
        name: of the format; what `export=` calls it.
        engine: what an export is proved with.
    """

    name: str
    engine: str

    def check(self, model: PreTrainedModel, act_ranges_change: bool = False) -> None:
        """Refuse a model that the format has no place for.

        Args:
            model: its blocks' linears either made quantizable, or fused.
            act_ranges_change: what is still to be done to the model may learn or clip ranges of activations.

        Raises:
            InputError: it has none.
        """
        family = find_family(model.config)
        quantized = quantized_schemes(model)
        if not quantized:
            raise InputError(f"export={self.name}: no linear is quantized")
        if qkv_quantizers(model):
            raise InputError(f"export={self.name}: engines do not quantize queries, keys and values: quant.qkv_bits=16")
        if family.experts:
            raise InputError(f"export={self.name}: transformers loads no quantized folder of a mixture of experts")
        if family.stored_transposed:
            raise InputError(
                f"export={self.name}: engines read quantized weights of nn.Linear only, and those of "
                f"{model.config.model_type} are transposed"
            )
        flat = family.flattens_tokens and any(found_anew(scheme) for scheme in quantized.values())
        if flat:
            raise InputError(
                f"export={self.name}: {model.config.model_type} flattens the tokens of a batch, where "
                "transformers finds one range of activations for all of them: quant.act_bits=16 or "
                "quant.act_granularity=tensor"
            )
        for name in quantized:
            linear = model.get_submodule(name)
            self.check_linear(name, linear)
            check_multiplier(name, linear, act_ranges_change)
        self.quantization_config(quantized, other_linears(model, quantized))

    @abstractmethod
    def check_linear(self, name: str, linear: QuantLinear | FusedLinear) -> None:
        """Refuse a quantized linear that the format has no place for, by its name and itself.

        Raises:
            InputError: it has none.
        """

    @abstractmethod
    def tensors(self, linear: FusedLinear) -> dict[str, torch.Tensor]:
        """Return what stands in the place of a quantized linear's weight, by names inside the linear."""

    @abstractmethod
    def quantization_config(self, schemes: Mapping[str, QuantScheme], others: list[str]) -> dict:
        """Return what config.json says of the quantization.

        Args:
            schemes: of the quantized linears, by name.
            others: the names of all other linears.

        Raises:
            InputError: the format has no words for it.
        """

    @abstractmethod
    def is_exact(self, schemes: Mapping[str, QuantScheme]) -> bool:
        """Return whether the engine's logits in float32 are those of the model in memory to the bit."""

    @abstractmethod
    def is_installed(self) -> bool:
        """Return whether the engine is here to prove an export with."""

    @abstractmethod
    def load_engine(self, folder: Path, schemes: Mapping[str, QuantScheme], device: torch.device) -> nn.Module:
        """Return the model as the engine, which is installed, loads it: in evaluation mode."""

    @abstractmethod
    def loading(self, schemes: Mapping[str, QuantScheme]) -> list[str]:
        """Return how each engine loads the folder, as lines of Markdown."""

    @abstractmethod
    def notes(self, schemes: Mapping[str, QuantScheme]) -> list[str]:
        """Return what a user of the folder must know, a line each."""

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        """Write a finished model into `folder`, which is made.

        Args:
            model: its blocks' linears are fused.
            tokenizer: the model's own.
            folder: a Hugging Face folder afterwards.

        Raises:
            InputError: see `check`.
        """
        self.check(model)
        linears = dict(fused_linears(model))
        quantized = {name: linear for name, linear in linears.items() if linear.scheme.is_quantized}
        left_out = {f"{name}.{part}" for name in linears for part in NOT_STORED} | {
            f"{name}.weight" for name in quantized
        }
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name not in left_out and ".act_quantizer." not in name
        }
        for name, linear in quantized.items():
            state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in self.tensors(linear).items()}
        schemes = {name: linear.scheme for name, linear in quantized.items()}
        model.config.quantization_config = self.quantization_config(schemes, other_linears(model, schemes))
        try:
            with quiet_transformers():
                model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_SIZE)
                tokenizer.save_pretrained(folder)
        finally:
            del model.config.quantization_config


def found_anew(scheme: QuantScheme) -> bool:
    """Return whether a linear's activations have a range of their own for each token."""
    return scheme.quantizes_activations and scheme.act_granularity == "token"


def quantized_schemes(model: nn.Module) -> dict[str, QuantScheme]:
    """Return the scheme of every linear that is quantized, by its name, before and after they are fused."""
    kinds = (QuantLinear, FusedLinear)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    return {name: linear.scheme for name, linear in linears if linear.scheme.is_quantized}


def other_linears(model: nn.Module, schemes: Mapping[str, QuantScheme]) -> list[str]:
    """Return the names of what engines could take for quantized linears and what is none: `lm_head`, routers, ..."""
    kinds = (nn.Linear, QuantLinear, FusedLinear)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name not in schemes]


def check_multiplier(name: str, linear: QuantLinear | FusedLinear, changes: bool) -> None:
    """Refuse a range of activations that an engine, which finds it anew for each token, does not compute.

    Args:
        name: of the linear.
        linear: quantized.
        changes: the range is still to be learned or clipped, where the linear's quantizer has a multiplier.

    Raises:
        InputError: a dynamic range has a multiplier, or will have one.
    """
    quantizer = linear.act_quantizer
    if quantizer is None or not quantizer.has_multiplier or not found_anew(linear.scheme):
        return
    multiplier = (quantizer.clip_ratio * quantizer.range_multiplier).item()
    if changes or multiplier != 1:
        factor = "a factor that is learned or found on the calibration data" if changes else f"{multiplier:.4g}"
        raise InputError(
            f"{name} multiplies the range of its activations by {factor}, which no engine does: "
            "quantize with target=transformers or target=vllm"
        )


def signed(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Return unsigned integers or zero points of `bits` bits as signed ones, int8.

    Example:
        >>> signed(torch.tensor([0, 8, 15], dtype=torch.uint8), 4)
        tensor([-8,  0,  7], dtype=torch.int8)
    """
    return (integers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
