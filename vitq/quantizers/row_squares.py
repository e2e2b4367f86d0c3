"""Squares in units of a row's own largest value, for softmax: codes that integer kernels can read.

    codes = round(H sqrt(p / max p)),        H = 2^bits - 1, the maximum over a row, the last axis
    p^ = integers / sum integers,            integers = round(T (codes / H)^2),  T = min(H^2, 255), the sum over the row

A softmax's rows are of very different sharpness: what is large in one is next to nothing in another, and one range for all wastes the
codes of most. A product with the values sums over a row, so that what a row is divided by comes out of it: rows of their own units
cost one division of the product's output, and the sum of a row's integers, which makes p^ a distribution as p is, is the product with
ones. Squares lie close together near 0, where most of a softmax is; up to 4 bits they are whole numbers of uint8 as they are, above they
are rounded to 0..255. In onnxruntime:

    Sub(x, ReduceMax(x)) -> Mul(1/2) -> Exp -> QuantizeLinear -> DequantizeLinear -> Mul with itself -> QuantizeLinear

since sqrt(p / max p) = exp((x - max x) / 2) of the softmax's own input x; the last three become one product of integers (QLinearMul).

Rows that are all 0 become even ones. Above 4 bits a small p^ may have another code than the p that became it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.affine import highest_code
from vitq.quantizers.checks import check, is_width

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RowSquares:
    """Of a width; nothing else is fitted."""

    bits: int

    def __post_init__(self) -> None:
        check(self, is_width(self.bits))

    @property
    def top(self) -> int:
        """T, the integer of a row's largest value."""
        return min(highest_code(self.bits) ** 2, 255)

    @property
    def scale(self) -> float:
        """What one step of the integers is worth of a row's largest value."""
        return 1 / self.top

    @property
    def zero_point(self) -> int:
        """The integer that stands for 0."""
        return 0

    def steps(self, x: Tensor) -> Tensor:
        """H sqrt(x / max x), what is rounded to a code, in [0, H]; values below 0 count as 0."""
        positive = x.clamp(0, _LARGEST)
        largest = positive.amax(-1, keepdim=True)
        return torch.where(largest > 0, positive / largest, 1.0).sqrt_().mul_(highest_code(self.bits))

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of rows x."""
        return self.steps(x).round_()

    def integers(self, codes: Tensor) -> Tensor:
        """The squares of codes, whole float32 numbers in 0..T."""
        highest = highest_code(self.bits)
        return codes.square() if self.top == highest**2 else codes.square().mul_(self.top / highest**2).round_()

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of rows of codes; a row without any integer above 0, which no x becomes, stands for zeros."""
        integers = self.integers(codes)
        return integers / integers.sum(-1, keepdim=True).clamp_(min=1)

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The values of each row's codes."""
        return self.dequantize(self.quantize(x))
