"""What a method is called, and which schemes it is made for."""

from dataclasses import dataclass

from cbq.errors import InputError, check_flag, check_text
from cbq.quant.scheme import FULL_PRECISION_BITS, QuantScheme


@dataclass(frozen=True)
class Method:
    """A named method of quantization. What it does is said by the other objects of a run.

    Args:
        name: for results.
        without_activations: it is made for schemes that quantize weights only.
        with_activations: it is made for schemes that quantize activations too.

    Raises:
        InputError: the name is no text, or another no truth value.

    Example:
        >>> Method("awq", with_activations=False).check(QuantScheme(4, 4))
        Traceback (most recent call last):
        cbq.errors.InputError: method=awq is for weights only: quant.act_bits must be 16, got 4
    """

    name: str
    without_activations: bool = True
    with_activations: bool = True

    def __post_init__(self) -> None:
        check_text("method.name", self.name)
        for key in ("without_activations", "with_activations"):
            check_flag(f"method.{key}", getattr(self, key))

    def check(self, scheme: QuantScheme) -> None:
        """Refuse a scheme that the method is not made for.

        Raises:
            InputError: the scheme quantizes activations, or does not, and the method is not for that.
        """
        if not self.with_activations:
            said = [("act_bits", scheme.act_bits), ("qkv_bits", scheme.qkv_bits)]
            said += [("overrides' act_bits", each.act_bits) for each in scheme.overridden()]
            for key, bits in said:
                if bits != FULL_PRECISION_BITS:
                    raise InputError(f"method={self.name} is for weights only: quant.{key} must be 16, got {bits}")
        if not self.without_activations and not any(
            each.quantizes_activations for each in (scheme, *scheme.overridden())
        ):
            raise InputError(f"method={self.name} is for activations too: quant.act_bits must be below 16")
