"""What is quantized to how many bits: the axis of the paper's tables 1, 2, 6, 13 and 14."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

from cbq.errors import InputError, check_flag

FULL_PRECISION_BITS = 16
SCALE_BITS = 16  # what engines store a scale in
ACT_GRANULARITIES = ("token", "tensor")
SCALE_DTYPES = ("float32", "bfloat16", "float16", "weight")
MODEL_WIDE = ("qkv_bits", "overrides")  # what is not said of a single linear


@dataclass(frozen=True)
class QuantScheme:
    r"""Bits, granularity and symmetry of the weights and activations of a model's blocks.

    Args:
        weight_bits: 2 to 8, or 16 (not quantized).
        act_bits: 2 to 8, or 16 (not quantized).
        group_size: input features that share a weight scale; -1 is per output channel, the paper's setting.
        symmetric: weights without a zero point.
        act_symmetric: activations without a zero point.
        act_denominator: symmetric activations: absmax / act_denominator is the scale; 2^(act_bits - 1) - 0.5 when
            None, or 2^(act_bits - 1) - 1.
        act_granularity: `token`, a range found anew for each token, the paper's setting; or `tensor`, one range a
            linear, found on the calibration data.
        engine_activations: activations as engines compute them: no S_X on the range of a token, and the zero point
            added before rounding.
        scale_dtype: what weight scales are rounded to wherever they are used: `float32`, `bfloat16`, `float16`, or
            `weight`, that of the weight.
        qkv_bits: of queries, keys and values after their position embedding, each token of each head by its own range;
            2 to 8, or 16 (not quantized, the paper's setting).
        overrides: exceptions, each a dict of `linears`, a regular expression for the whole name of a linear, and the
            fields above that are different there; a later one wins. A linear is called by its block and by its name
            in it, `blocks.0.mlp.down_proj`; blocks also count from the last one, `blocks.-1.mlp.down_proj`.

    Raises:
        InputError: a value is out of range, or an override has an unknown key or is no regular expression.

    Example:
        >>> QuantScheme(weight_bits=4, act_bits=8).label
        'W4A8'
        >>> QuantScheme(weight_bits=2, act_bits=16, group_size=64).label
        'W2A16g64'
        >>> QuantScheme(weight_bits=4, act_bits=4, qkv_bits=4).label
        'W4A4-qkv4'
        >>> star = QuantScheme(2, 16, overrides=[{"linears": r"blocks\.-1\..*", "weight_bits": 4}])
        >>> star.of_linear(["blocks.7.mlp.up_proj", "blocks.-1.mlp.up_proj"]).weight_bits
        4

    Source: section 5.1.
    """

    weight_bits: int
    act_bits: int
    group_size: int = -1
    symmetric: bool = False
    act_symmetric: bool = False
    act_denominator: float | None = None
    act_granularity: str = "token"
    engine_activations: bool = False
    scale_dtype: str = "float32"
    qkv_bits: int = FULL_PRECISION_BITS
    overrides: Sequence[Mapping] = ()

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "qkv_bits"):
            bits = getattr(self, name)
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (*range(2, 9), FULL_PRECISION_BITS):
                raise InputError(f"quant.{name} must be 2 to 8, or 16 for full precision, got {bits!r}")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int):
            raise InputError(f"quant.group_size must be an integer, got {self.group_size!r}")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"quant.group_size must be -1 (per channel) or at least 1, got {self.group_size}")
        for name in ("symmetric", "act_symmetric", "engine_activations"):
            check_flag(f"quant.{name}", getattr(self, name))
        for name, choices in (("act_granularity", ACT_GRANULARITIES), ("scale_dtype", SCALE_DTYPES)):
            if getattr(self, name) not in choices:
                raise InputError(f"quant.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.act_denominator is not None:
            half = 2 ** (self.act_bits - 1)
            if not self.act_symmetric or self.act_bits == FULL_PRECISION_BITS:
                raise InputError("quant.act_denominator needs quant.act_symmetric=true and quant.act_bits below 16")
            if self.act_denominator not in (half - 1, half - 0.5):
                raise InputError(
                    f"quant.act_denominator must be {half - 1} or {half - 0.5}, got {self.act_denominator}"
                )
        if isinstance(self.overrides, str | Mapping) or not isinstance(self.overrides, Sequence):
            raise InputError(f"quant.overrides must be a list: [{{linears: <pattern>, ...}}], got {self.overrides!r}")
        for override in self.overrides:
            self._with(override)

    def _with(self, override: Mapping) -> "QuantScheme":
        """Return the scheme that one override makes of this one."""
        allowed = [field.name for field in fields(self) if field.name not in MODEL_WIDE]
        if not isinstance(override, Mapping) or not isinstance(override.get("linears"), str):
            raise InputError(
                f"quant.overrides must each be {{linears: <pattern>, <option>: <value>}}, got {override!r}"
            )
        unknown = sorted(set(override) - {"linears", *allowed})
        if unknown:
            raise InputError(f"quant.overrides may set {', '.join(allowed)}, got {', '.join(map(str, unknown))}")
        if len(override) == 1:
            raise InputError(f"quant.overrides: {override['linears']!r} sets nothing; it may set {', '.join(allowed)}")
        try:
            re.compile(override["linears"])
        except re.error as error:
            raise InputError(f"quant.overrides: {override['linears']!r} is no regular expression: {error}") from None
        return replace(self, overrides=(), **{key: value for key, value in override.items() if key != "linears"})

    def overridden(self) -> list["QuantScheme"]:
        """Return the scheme that each override makes of this one alone."""
        return [self._with(override) for override in self.overrides]

    def matching(self, names: Iterable[str]) -> list[int]:
        """Return which overrides apply to a linear that is called by any of `names`."""
        names = list(names)
        return [
            number
            for number, override in enumerate(self.overrides)
            if any(re.fullmatch(override["linears"], name) for name in names)
        ]

    def of_linear(self, names: Iterable[str]) -> "QuantScheme":
        """Return the scheme of the linear that is called by any of `names`: without overrides, those applied."""
        scheme = replace(self, overrides=(), qkv_bits=FULL_PRECISION_BITS)
        for number in self.matching(names):
            scheme = scheme._with(self.overrides[number])
        return scheme

    @classmethod
    def parse(cls, label: str) -> "QuantScheme":
        """Return the scheme of a label, with the defaults for what a label does not say.

        Raises:
            InputError: the text is no label.

        Example:
            >>> QuantScheme.parse("w3a16g128-qkv8") == QuantScheme(3, 16, group_size=128, qkv_bits=8)
            True
        """
        parts = re.fullmatch(r"w(\d+)a(\d+)(?:g(\d+))?(?:-qkv(\d+))?", label.lower())
        if parts is None:
            raise InputError(f"a scheme's label must be like w4a4, w2a16g128 or w4a4-qkv4, got {label!r}")
        weight_bits, act_bits, group_size, qkv_bits = parts.groups()
        return cls(
            int(weight_bits), int(act_bits), int(group_size or -1), qkv_bits=int(qkv_bits or FULL_PRECISION_BITS)
        )

    def stored_bits(self, out_features: int, in_features: int) -> int:
        """Return what a linear takes: its integers, 16-bit scales, and zero points where they vary; no overrides.

        Example:
            >>> QuantScheme(weight_bits=2, act_bits=16).stored_bits(out_features=10, in_features=100)
            2180
        """
        bits = out_features * in_features * self.weight_bits
        if not self.quantizes_weights:
            return bits
        groups = out_features * (1 if self.group_size == -1 else in_features // self.group_size)
        return bits + groups * (SCALE_BITS + (0 if self.symmetric else self.weight_bits))

    @property
    def label(self) -> str:
        """The field's short name, with the group size where there are groups, and a star for overrides (CBQ*)."""
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        qkv = f"-qkv{self.qkv_bits}" if self.quantizes_qkv else ""
        return f"W{self.weight_bits}A{self.act_bits}{group}{qkv}{'*' if self.overrides else ''}"

    @property
    def quantizes_weights(self) -> bool:
        """Whether weights are quantized at all."""
        return self.weight_bits != FULL_PRECISION_BITS

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized at all."""
        return self.act_bits != FULL_PRECISION_BITS

    @property
    def quantizes_qkv(self) -> bool:
        """Whether queries, keys and values are quantized."""
        return self.qkv_bits != FULL_PRECISION_BITS

    @property
    def is_quantized(self) -> bool:
        """Whether a linear of this scheme differs from full precision."""
        return self.quantizes_weights or self.quantizes_activations


def changes(wanted: QuantScheme, found: QuantScheme) -> dict[str, object]:
    """Return the fields in which one scheme differs from another that was wanted, with its values."""
    return {key: value for key, value in asdict(found).items() if value != asdict(wanted)[key]}
