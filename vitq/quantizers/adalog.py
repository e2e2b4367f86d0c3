"""Powers of a searched base, for softmax and GELU: AdaLog (Wu et al., ECCV 2024), with its bias reparameterization.

    codes = clip(round(-log2((x + shift) / scale) 37 / q), 0, 2^bits - 1)        x^ = scale 2^(-codes q / 37) - shift

The base 2^(q / 37) has a whole q, so that shifts and a table of the 37 powers 2^(-j / 37) compute x^. `shift` brings the negative values
of a GELU, none below -0.16997, into the logarithm's domain; the bias of the layer that reads can take it up.
Differs from the paper: the table is exact, where the paper rounds it to multiples of 1 / (2^(bits + 1) - 2); the last code may stand for 0
(logarithm.py), which is -shift after the shift.
"""

from dataclasses import dataclass

from torch import Tensor

from vitq.quantizers.checks import check, is_scale, is_width
from vitq.quantizers.logarithm import log_codes, log_values

DENOMINATOR = 37
LARGEST_NUMERATOR = 138
_SMALLEST_SHIFTED = 2.0**-15  # of the shift: a smaller power loses its digits when the shift is taken off, and counts as 0


@dataclass(frozen=True)
class AdaLog:
    """The powers scale, scale / base, scale / base^2, ... less `shift`, base = 2^(numerator / 37); `holds_zero`: 0 in place of the last."""

    scale: float
    numerator: int
    bits: int
    shift: float = 0.0
    holds_zero: bool = False

    def __post_init__(self) -> None:
        whole = type(self.numerator) is int and 1 <= self.numerator <= LARGEST_NUMERATOR
        check(self, is_width(self.bits), is_scale(self.scale), whole, type(self.holds_zero) is bool)
        check(self, self.shift == 0.0 or is_scale(self.shift))

    @property
    def step(self) -> float:
        """The logarithm of the base, to base 2."""
        return self.numerator / DENOMINATOR

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        return log_codes(x + self.shift if self.shift else x, self.scale, self.step, self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        if not self.shift:
            return log_values(codes, self.scale, self.step, self.bits, self.holds_zero)
        smallest = _SMALLEST_SHIFTED * self.shift
        return log_values(codes, self.scale, self.step, self.bits, self.holds_zero, smallest) - self.shift

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The value of each x's code."""
        return self.dequantize(self.quantize(x))
