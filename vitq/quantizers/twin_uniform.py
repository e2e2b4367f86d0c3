"""Two step sizes, one bit to choose: PTQ4ViT (Yuan et al., ECCV 2022, section "Twin Uniform Quantization").

With n = 2^(bits - 1), the two ranges have the codes and values

    codes of the lower range    clip(round(±x / lower_step), 0, n - 1)             x^ = ±lower_step codes
    codes of the upper range    n + clip(round(x / upper_step), 0, n - 1)          x^ = upper_step (codes - n)

For softmax (sign +) the lower range gives small values a finer step. For GELU (sign -, `negative`) it holds the values below 0.
Differs from the paper: the ranges meet halfway between the lower one's last value and the upper one's next, so that every x gets the
nearer one; beyond the paper's boundary, lower_step n, a value may be rounded to less than what smaller ones become. Upper values inside
the lower range are not used. The ratio of the steps need not be a power of two.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.quantizers.checks import check, is_scale, is_width


@dataclass(frozen=True)
class TwinUniform:
    """The multiples 0 to n - 1 of `lower_step` and of `upper_step`, which is not the smaller one.

    Where `negative` is set, the lower ones are taken negative, and either step may be the smaller one.
    """

    lower_step: float
    upper_step: float
    bits: int
    negative: bool = False

    def __post_init__(self) -> None:
        check(self, is_width(self.bits), is_scale(self.lower_step), is_scale(self.upper_step), type(self.negative) is bool)
        check(self, self.negative or self.lower_step <= self.upper_step)

    @property
    def split(self) -> float:
        """Above it the upper range begins."""
        if self.negative:
            return 0.0
        last = self.lower_step * (self._half - 1)
        return (last + self.upper_step * (math.floor(last / self.upper_step) + 1)) / 2

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        lower = (x / (-self.lower_step if self.negative else self.lower_step)).round_().clamp_(0, self._half - 1)
        upper = (x / self.upper_step).round_().clamp_(0, self._half - 1).add_(self._half)
        return torch.where(x > self.split, upper, lower)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        lower = codes * (-self.lower_step if self.negative else self.lower_step)
        return torch.where(codes < self._half, lower, (codes - self._half) * self.upper_step)

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The value of each x's code."""
        return self.dequantize(self.quantize(x))

    @property
    def _half(self) -> int:
        return 2 ** (self.bits - 1)
