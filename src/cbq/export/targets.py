"""What engines compute, told before anything is learned.

A target turns a scheme into the one that its engine computes, or refuses it and names the nearest that the engine runs.
What is learned under that scheme is then exported without a loss. Every fact here was found by running the engine, on a
CPU (docs/export.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, replace

from cbq.errors import InputError
from cbq.quant.scheme import FULL_PRECISION_BITS, MODEL_WIDE, SCALE_DTYPES, QuantScheme

OF_LINEARS = [field.name for field in fields(QuantScheme) if field.name not in MODEL_WIDE]


class NoTarget:
    """Constrains nothing."""

    def constrain(self, scheme: QuantScheme) -> QuantScheme:
        """Return the scheme as it is."""
        return scheme

    def check(self, schemes: Mapping[str, QuantScheme]) -> None:
        """Refuse nothing."""


class Target(ABC):
    """An engine.

    Attributes:
        name: what `target=` calls it.
    """

    name: str

    def constrain(self, scheme: QuantScheme) -> QuantScheme:
        """Return the scheme that the engine computes.

        Raises:
            InputError: it has no kernels for bits, groups or granularity.
        """
        if scheme.quantizes_qkv:
            raise InputError(f"target={self.name} does not quantize queries, keys and values: quant.qkv_bits=16")
        base = self.constrain_linear(replace(scheme, overrides=()))
        overrides = []
        for override, wanted in zip(scheme.overrides, scheme.overridden(), strict=True):
            found = self.constrain_linear(wanted)
            different = {
                name: getattr(found, name) for name in OF_LINEARS if getattr(found, name) != getattr(base, name)
            }
            given = {name: getattr(found, name) for name in OF_LINEARS if name in override}
            overrides.append({"linears": override["linears"]} | given | different)
        return replace(base, overrides=overrides or scheme.overrides)

    def check(self, schemes: Mapping[str, QuantScheme]) -> None:
        """Refuse what several overrides make of a linear together, where each of them alone can be run.

        Args:
            schemes: of the linears, by name.

        Raises:
            InputError: the engine computes something else for one.
        """
        for name, scheme in schemes.items():
            try:
                same = self.constrain_linear(scheme) == scheme
            except InputError:
                same = False
            if not same:
                raise InputError(f"target={self.name} cannot run {name} as quant.overrides make it: {scheme.label}")

    def constrain_linear(self, scheme: QuantScheme) -> QuantScheme:
        """Return the scheme that the engine computes for a linear; one in full precision stays.

        Raises:
            InputError: see `constrain`.
        """
        if not scheme.is_quantized:
            return replace(scheme, act_denominator=None)
        if not scheme.quantizes_weights:
            raise self.refusal(scheme, weight_bits=8, act_bits=8)
        return self.constrain_quantized(scheme)

    @abstractmethod
    def constrain_quantized(self, scheme: QuantScheme) -> QuantScheme:
        """Return the scheme that the engine computes for a linear whose weights, at least, are quantized.

        Raises:
            InputError: see `constrain`.
        """

    def refusal(self, scheme: QuantScheme, **nearest: object) -> InputError:
        """Return the error that names the nearest scheme."""
        options = " ".join(f"quant.{name}={value}" for name, value in nearest.items() if value != getattr(scheme, name))
        return InputError(f"target={self.name} cannot run {scheme.label}; the nearest that it can: {options}")


class Transformers(Target):
    """transformers with compressed-tensors 0.20, which simulates every scheme.

    Weights alone are symmetric: packed zero points are not read. Activations are found anew for each token, with
    absmax / (2^(b - 1) - 0.5) where they are symmetric.
    """

    name = "transformers"

    def constrain_quantized(self, scheme: QuantScheme) -> QuantScheme:
        symmetric = scheme.symmetric or not scheme.quantizes_activations
        return replace(scheme, symmetric=symmetric, act_denominator=None, engine_activations=True, scale_dtype="weight")


class VLLM(Target):
    """vLLM's CPU build 0.32: W4A16 in bfloat16; W8A8 and W4A8 with integer products.

    Args:
        scale_dtype: what vLLM computes W4A16 in.

    Raises:
        InputError: it is no type.
    """

    name = "vllm"
    group_sizes = (-1, 32, 64, 128)

    def __init__(self, scale_dtype: str = "bfloat16") -> None:
        if scale_dtype not in SCALE_DTYPES:
            raise InputError(f"target.scale_dtype must be one of {', '.join(SCALE_DTYPES)}, got {scale_dtype!r}")
        self.scale_dtype = scale_dtype

    def constrain_quantized(self, scheme: QuantScheme) -> QuantScheme:
        if not scheme.quantizes_activations:
            if scheme.weight_bits != 4 or scheme.group_size not in self.group_sizes:
                raise self.refusal(scheme, weight_bits=4, group_size=nearest(scheme.group_size, self.group_sizes))
            return replace(scheme, act_denominator=None, scale_dtype=self.scale_dtype)
        if (scheme.act_bits, scheme.group_size, scheme.act_granularity) != (8, -1, "token") or (
            scheme.weight_bits not in (4, 8)
        ):
            bits = nearest(scheme.weight_bits, (4, 8))
            raise self.refusal(scheme, weight_bits=bits, act_bits=8, group_size=-1, act_granularity="token")
        integer_products = scheme.weight_bits == 8
        return replace(
            scheme,
            symmetric=True,
            # Whatever the checkpoint says, the kernel of W4A8 finds both ends of a token's range.
            act_symmetric=integer_products,
            act_denominator=127 if integer_products else None,
            engine_activations=True,
            scale_dtype="float32",
        )


class AutoRound(Target):
    """The GPTQ layout as AutoRound 0.16 reads it: symmetric weights in groups, scales in float16, no activations."""

    name = "autoround"
    weight_bits = (2, 3, 4, 8)
    group_sizes = (-1, 32, 64, 128)

    def constrain_quantized(self, scheme: QuantScheme) -> QuantScheme:
        known = scheme.weight_bits in self.weight_bits and scheme.group_size in self.group_sizes
        if scheme.quantizes_activations or not known:
            raise self.refusal(
                scheme,
                weight_bits=nearest(scheme.weight_bits, self.weight_bits),
                act_bits=FULL_PRECISION_BITS,
                group_size=nearest(scheme.group_size, self.group_sizes),
            )
        return replace(scheme, symmetric=True, act_denominator=None, scale_dtype="float16")


def nearest(value: int, choices: tuple[int, ...]) -> int:
    """Return the choice that is closest to a value, the larger one of two.

    Example:
        >>> nearest(6, (2, 3, 4, 8)), nearest(16, (-1, 32, 64, 128))
        (8, 32)
    """
    return value if value in choices else min(choices, key=lambda choice: (abs(choice - value), -choice))
