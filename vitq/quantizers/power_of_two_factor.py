"""One scale a tensor and a power of two a channel: FQ-ViT (Lin et al., IJCAI 2022, Power-of-Two Factor), for LayerNorms.

    codes = clip(round(x / (2^a_c scale)) + zero_point, 0, 2^bits - 1)        x^ = 2^a_c scale (codes - zero_point)

for channel c, the last axis of x; a_c is 0 to 3. The zero point is common. An integer LayerNorm takes up 2^a_c as a shift.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq import affine
from vitq.quantizers.checks import check, is_code, is_scale, is_width

LARGEST_EXPONENT = 3


@dataclass(frozen=True)
class PowerOfTwoFactor:
    """Equal steps of 2^exponent scale in each channel; `exponents` holds one number a channel, x is (..., channels)."""

    scale: float
    zero_point: int
    bits: int
    exponents: tuple[int, ...]

    def __post_init__(self) -> None:
        check(self, is_width(self.bits), is_scale(self.scale), is_width(self.bits) and is_code(self.zero_point, self.bits))
        fitting = (type(exponent) is int and 0 <= exponent <= LARGEST_EXPONENT for exponent in self.exponents)
        check(self, type(self.exponents) is tuple and len(self.exponents) > 0 and all(fitting))

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        return affine.quantize(x, self._scales(x), self.zero_point, self.bits)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        return (codes - self.zero_point) * self._scales(codes)

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The value of each x's code."""
        return affine.quantize_dequantize(x, self._scales(x), self.zero_point, self.bits)

    def _scales(self, like: Tensor) -> Tensor:
        return torch.tensor([self.scale * 2**exponent for exponent in self.exponents], dtype=like.dtype, device=like.device)
