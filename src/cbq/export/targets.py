"""What engines compute, told before anything is learned.

A target turns a scheme into the one that its engine computes, or refuses it and names the nearest that the engine runs.
What is learned under that scheme is then exported without a loss. Every fact here was found by running the engine, on a
CPU (docs/export.md).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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

    def notes(self, constraints: Mapping[str, object]) -> list[str]:
        """Return nothing to say."""
        return []


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
        plain = replace(scheme, overrides=())
        runnable = self.nearest(replace(plain, qkv_bits=FULL_PRECISION_BITS))
        if runnable != plain:
            said = " ".join(f"quant.{name}={value}" for name, value in changes(plain, runnable).items())
            raise InputError(f"target={self.name} cannot run {plain.label}; the nearest that it can: {said}")
        base = self.constrain_linear(plain)
        overrides = []
        for number, (override, wanted) in enumerate(zip(scheme.overrides, scheme.overridden(), strict=True)):
            if (runnable := self.nearest(wanted)) != wanted:
                said = typed(scheme.overrides, number, changes(wanted, runnable))
                raise InputError(
                    f"target={self.name} cannot run {wanted.label}, which quant.overrides make of "
                    f"{override['linears']!r}; the nearest that it can: {said}"
                )
            found = self.constrain_linear(wanted)
            different = {
                name: getattr(found, name) for name in OF_LINEARS if getattr(found, name) != getattr(base, name)
            }
            given = {name: getattr(found, name) for name in OF_LINEARS if name in override}
            overrides.append({"linears": override["linears"]} | given | different)
        return replace(base, overrides=overrides or scheme.overrides)

    def notes(self, constraints: Mapping[str, object]) -> list[str]:
        """Return what is worth a word of the fields of a scheme that `constrain` changed, in lines."""
        said = ", ".join(f"{name}={value}" for name, value in constraints.items())
        return [f"for target={self.name}: {said}"] if said else []

    def check(self, schemes: Mapping[str, QuantScheme]) -> None:
        """Refuse what several overrides make of a linear together, where each of them alone can be run.

        Args:
            schemes: of the linears, by name.

        Raises:
            InputError: the engine computes something else for one.
        """
        for name, scheme in schemes.items():
            runnable = self.nearest(scheme)
            if self.constrain_linear(runnable) != scheme:
                raise InputError(
                    f"target={self.name} cannot run {name} as quant.overrides make it: {scheme.label}; "
                    f"the nearest that it can: {runnable.label}"
                )

    def nearest(self, scheme: QuantScheme) -> QuantScheme:
        """Return the nearest scheme that the engine has kernels for: where it has, or in full precision, the same."""
        return self.nearest_quantized(scheme) if scheme.is_quantized else scheme

    def constrain_linear(self, scheme: QuantScheme) -> QuantScheme:
        """Return what the engine computes for a linear whose scheme it has kernels for; full precision stays."""
        return self.constrain_quantized(scheme) if scheme.is_quantized else replace(scheme, act_denominator=None)

    @abstractmethod
    def nearest_quantized(self, scheme: QuantScheme) -> QuantScheme:
        """Return the nearest scheme that the engine has kernels for, with quantized weights."""

    @abstractmethod
    def constrain_quantized(self, scheme: QuantScheme) -> QuantScheme:
        """Return what the engine computes for a linear whose scheme, with quantized weights, it has kernels for."""


class Transformers(Target):
    """transformers with compressed-tensors 0.20, which simulates every scheme.

    Weights alone are symmetric: packed zero points are not read. Activations are found anew for each token, with
    absmax / (2^(b - 1) - 0.5) where they are symmetric.
    """

    name = "transformers"

    def nearest_quantized(self, scheme: QuantScheme) -> QuantScheme:
        return scheme if scheme.quantizes_weights else replace(scheme, weight_bits=8)

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

    def nearest_quantized(self, scheme: QuantScheme) -> QuantScheme:
        if not scheme.quantizes_activations:
            return replace(scheme, weight_bits=4, group_size=closest(scheme.group_size, self.group_sizes))
        bits = closest(scheme.weight_bits, (4, 8))
        return replace(scheme, weight_bits=bits, act_bits=8, group_size=-1, act_granularity="token")

    def constrain_quantized(self, scheme: QuantScheme) -> QuantScheme:
        if not scheme.quantizes_activations:
            return replace(scheme, act_denominator=None, scale_dtype=self.scale_dtype)
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
    """The GPTQ layout as AutoRound 0.16 reads it: weights alone, in groups, symmetric or not, scales in float16."""

    name = "autoround"
    weight_bits = (2, 3, 4, 8)
    group_sizes = (-1, 32, 64, 128)

    def nearest_quantized(self, scheme: QuantScheme) -> QuantScheme:
        return replace(
            scheme,
            weight_bits=closest(scheme.weight_bits, self.weight_bits),
            act_bits=FULL_PRECISION_BITS,
            group_size=closest(scheme.group_size, self.group_sizes),
        )

    def constrain_quantized(self, scheme: QuantScheme) -> QuantScheme:
        return replace(scheme, act_denominator=None, scale_dtype="float16")


def changes(scheme: QuantScheme, runnable: QuantScheme) -> dict[str, object]:
    """Return the fields in which another scheme differs, with their values there."""
    values = {field.name: getattr(runnable, field.name) for field in fields(QuantScheme)}
    return {name: value for name, value in values.items() if value != getattr(scheme, name)}


def typed(overrides: Sequence[Mapping], number: int, changed: Mapping) -> str:
    """Return `quant.overrides=` as it is typed in a shell, one of the overrides changed.

    Example:
        >>> print(typed([{"linears": ".*o_proj", "weight_bits": 2}], 0, {"weight_bits": 4}))
        'quant.overrides=[{linears: ".*o_proj", weight_bits: 4}]'
    """
    wanted = [override | changed if index == number else override for index, override in enumerate(overrides)]
    items = [{key: f'"{value}"' if key == "linears" else value for key, value in each.items()} for each in wanted]
    said = ", ".join("{" + ", ".join(f"{key}: {value}" for key, value in item.items()) + "}" for item in items)
    return f"'quant.overrides=[{said}]'"


def closest(value: int, choices: tuple[int, ...]) -> int:
    """Return the choice that is closest to a value, the larger one of two.

    Example:
        >>> closest(6, (2, 3, 4, 8)), closest(16, (-1, 32, 64, 128))
        (8, 32)
    """
    return value if value in choices else min(choices, key=lambda choice: (abs(choice - value), -choice))
