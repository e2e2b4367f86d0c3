"""Powers of two, for softmax: FQ-ViT (Lin et al., IJCAI 2022, Log-Int-Softmax) and many after it.

    codes = clip(round(-log2(x / scale)), 0, 2^bits - 1)        x^ = scale 2^-codes

With scale 1 and without `holds_zero` it runs in onnxruntime as LogSoftmax -> QuantizeLinear -> DequantizeLinear -> Exp, without a slow op.
Differs from the paper: the scale is fitted, and the last code may stand for 0 (logarithm.py).
"""

from dataclasses import dataclass

from torch import Tensor

from vitq.quantizers.checks import check, is_scale, is_width
from vitq.quantizers.logarithm import log_codes, log_values


@dataclass(frozen=True)
class Log2:
    """The powers scale, scale / 2, scale / 4, ...; with `holds_zero`, 0 in place of the last."""

    scale: float
    bits: int
    holds_zero: bool = False

    def __post_init__(self) -> None:
        check(self, is_width(self.bits), is_scale(self.scale), type(self.holds_zero) is bool)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        return log_codes(x, self.scale, 1.0, self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        return log_values(codes, self.scale, 1.0, self.bits, self.holds_zero)

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The value of each x's code."""
        return self.dequantize(self.quantize(x))
