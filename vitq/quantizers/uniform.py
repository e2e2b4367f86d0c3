"""The affine quantizer of vitq.affine, as one quantizer among others.

    codes = clip(round(x / scale) + zero_point, 0, 2^bits - 1)        x^ = scale (codes - zero_point)

It is the one that integer kernels read.
"""

from dataclasses import dataclass

from torch import Tensor

from vitq import affine
from vitq.quantizers.checks import check, is_code, is_scale, is_width


@dataclass(frozen=True)
class Uniform:
    """Equal steps of `scale`; `zero_point` is the code of 0."""

    scale: float
    zero_point: int
    bits: int

    def __post_init__(self) -> None:
        check(self, is_width(self.bits), is_scale(self.scale), is_width(self.bits) and is_code(self.zero_point, self.bits))

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        return affine.quantize(x, self.scale, self.zero_point, self.bits)

    def integers(self, codes: Tensor) -> Tensor:
        """The codes themselves, which integer kernels read."""
        return codes

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        return (codes - self.zero_point) * self.scale

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The value of each x's code."""
        return affine.quantize_dequantize(x, self.scale, self.zero_point, self.bits)
