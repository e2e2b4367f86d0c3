"""Powers of the square root of two, for softmax: RepQ-ViT (Li et al., ICCV 2023, log-sqrt2 for softmax activations).

    codes = clip(round(-2 log2(x / scale)), 0, 2^bits - 1)        x^ = scale 2^(-codes / 2)

The paper writes x^ as scale 2^(-ceil(codes / 2)) (1 + [codes odd] (sqrt 2 - 1)), the same number, to show that shifts compute it.
Differs from the paper: the last code may stand for 0 (logarithm.py).
"""

from dataclasses import dataclass

from torch import Tensor

from vitq.quantizers.checks import check, is_scale, is_width
from vitq.quantizers.logarithm import log_codes, log_values


@dataclass(frozen=True)
class LogSqrt2:
    """The powers scale, scale / sqrt 2, scale / 2, ...; with `holds_zero`, 0 in place of the last."""

    scale: float
    bits: int
    holds_zero: bool = False

    def __post_init__(self) -> None:
        check(self, is_width(self.bits), is_scale(self.scale), type(self.holds_zero) is bool)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        return log_codes(x, self.scale, 0.5, self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        return log_values(codes, self.scale, 0.5, self.bits, self.holds_zero)

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The value of each x's code."""
        return self.dequantize(self.quantize(x))
