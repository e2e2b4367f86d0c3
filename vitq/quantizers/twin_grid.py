"""Two step sizes on an 8-bit grid, for GELU: fine steps up to a knee and coarse ones above, which integer kernels can read.

    codes = c with the grid's number g(c) nearest to round(x / scale) + zero_point,        c of 0..2^bits - 1
    x^ = scale (g(c) - zero_point),        g(c) = c up to the knee, knee + ratio (c - knee) above

Most of a GELU's outputs lie in its shallow dip below 0 or near it and a few reach far: at 4 bits equal steps leave three times the error.
The grid's numbers are uint8, so the product with the weights stays an integer kernel. In onnxruntime it runs as

    QuantizeLinear -> DequantizeLinear -> LeakyRelu(ratio) -> QuantizeLinear -> DequantizeLinear -> LeakyRelu(1 / ratio) -> QuantizeLinear

where each zero point between them stands for the knee: there LeakyRelu stretches what is below, so that whole steps come out on both sides,
and back. uint8 saturates below in the first and above in the second. Each LeakyRelu with its neighbours becomes one look-up in a table of
256 (QLinearLeakyRelu). The ratio is odd: no whole number of steps lies in the middle of two codes, and two roundings are as good as one.

From PTQ4ViT's twin uniform quantization (Yuan et al., ECCV 2022). Differs from the paper: the knee may be anywhere and is not at 0, the
smaller step divides the larger one, and one zero point serves both, so that stock kernels read it.
"""

from dataclasses import dataclass

from torch import Tensor

from vitq.affine import highest_code
from vitq.quantizers.checks import check, is_code, is_scale, is_width

TOP = 255  # of the grid


@dataclass(frozen=True)
class TwinGrid:
    """Steps of `scale` up to code `knee`, of `ratio` times that above; `zero_point`, a code up to the knee, stands for 0."""

    scale: float
    zero_point: int
    knee: int
    ratio: int
    bits: int

    def __post_init__(self) -> None:
        check(self, is_width(self.bits), is_scale(self.scale), type(self.ratio) is int and self.ratio >= 3 and self.ratio % 2 == 1)
        check(self, is_code(self.knee, self.bits), is_code(self.zero_point, self.bits))
        check(self, self.zero_point <= self.knee, self.knee + self.ratio * (highest_code(self.bits) - self.knee) <= TOP)

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of x."""
        return self.codes(x / self.scale)

    def codes(self, steps: Tensor) -> Tensor:
        """The codes of x / scale."""
        whole = steps.round() + self.zero_point
        coarse = (whole - self.knee).clamp_(min=0).div_(self.ratio).round_()
        return whole.clamp_(0, self.knee).add_(coarse).clamp_(max=highest_code(self.bits))

    def integers(self, codes: Tensor) -> Tensor:
        """The numbers of the grid that codes stand for, whole float32 numbers in 0..255."""
        return codes + (codes - self.knee).clamp(min=0) * (self.ratio - 1)

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values of codes."""
        return (self.integers(codes) - self.zero_point) * self.scale

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """The value of each x's code."""
        return self.dequantize(self.quantize(x))
