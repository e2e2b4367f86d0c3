"""The affine quantizer: code ranges, scales and zero points, codes and back.

    codes = clip(round(x / scale) + zero_point, 0, 2^bits - 1)        x^ = scale (codes - zero_point)

Codes are unsigned. The range [low, high] that the codes span always holds 0, so that zero is exact and the zero point is itself a
code. Rounding is half to even, as in ONNX's QuantizeLinear, and the division is float32, so that codes agree with the runtime's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in codes, with one scale and zero point an output channel (axis 0).

    `codes` is uint8 of the weight's shape (O, ...), within `weight_codes(bits)`; `scale` float32 (O,); `zero_point` uint8 (O,). The
    integers `codes - zero_point` lie within -64..64 at every width, see `weight_qparams`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    def integers(self) -> Tensor:
        """`codes - zero_point` as int8, of the weight's shape."""
        return (self.codes.to(torch.int16) - _per_channel(self.zero_point.to(torch.int16), self.codes)).to(torch.int8)

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, float32."""
        return self.integers().to(torch.float32) * _per_channel(self.scale, self.codes)


def highest_code(bits: int) -> int:
    """The largest code of a width, 2^bits - 1."""
    return 2**bits - 1


def choose_qparams(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose codes span [low, high], widened to hold 0.

    Args:
        low: lower ends, float32, any shape.
        high: upper ends, of the same shape.
        bits: 2 to 8.

    Returns:
        scale (float32, positive) and zero point (float32, whole, in [0, 2^bits - 1]), of the same shape.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / highest_code(bits)).to(torch.float32)
    scale = torch.where(scale > _SMALLEST_SCALE, scale, torch.ones_like(scale))  # a constant zero: any scale is exact
    return scale, (-low / scale).round().clamp(0, highest_code(bits))


def quantize(x: Tensor, scale: Tensor | float, zero_point: Tensor | float, bits: int) -> Tensor:
    """The codes of `x`, as whole float32 numbers in [0, 2^bits - 1], of x's shape; scale and zero point broadcast."""
    return (x / scale).round_().add_(zero_point).clamp_(0, highest_code(bits))  # in place: memory traffic is the cost


def quantize_dequantize(x: Tensor, scale: Tensor | float, zero_point: Tensor | float, bits: int, out: Tensor | None = None) -> Tensor:
    """`x` moved to the nearest value that has a code: fake quantization, of x's shape and dtype; into `out` where given."""
    steps = torch.div(x, scale, out=out).round_()
    steps.clamp_(-zero_point, highest_code(bits) - zero_point)  # type: ignore[arg-type]  # codes less their zero point
    return steps.mul_(scale)


def weight_qparams(low: Tensor, high: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of weights whose channels span [low, high], each (O,): asymmetric up to 6 bits, symmetric at 7 and 8.

    Integer kernels want weights with zero point 0 in int8, so what they read are the integers `codes - zero_point`. Processors without
    VNNI multiply a pair of 8-bit activations with a pair of weights and add both in 16 bits, which saturates: 255 (|v| + |w|) <= 32767
    holds for all pairs where no integer exceeds 64. Up to 6 bits none does, whatever the zero point; at 7 bits -64..63 and at 8 bits
    -64..64 are kept to, so that a file computes the same everywhere. With `symmetric` the zero point is 2^(bits - 1) at every width.
    """
    if bits < 7 and not symmetric:
        return choose_qparams(low, high, bits)
    zero_point = 2.0 ** (bits - 1)
    scale = (torch.maximum(-low, high).clamp(min=0) / (weight_codes(bits)[1] - zero_point)).to(torch.float32)
    scale = torch.where(scale > _SMALLEST_SCALE, scale, torch.ones_like(scale))
    return scale, torch.full_like(scale, zero_point)


def weight_codes(bits: int) -> tuple[int, int]:
    """The smallest and the largest code of a weight: 0 and 2^bits - 1; at 8 bits 64 and 192."""
    return (64, 192) if bits == 8 else (0, highest_code(bits))


def quantize_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> QuantizedWeight:
    """The codes of a weight (O, ...) under per-channel scale and zero point, each (O,)."""
    codes = quantize(weight, _per_channel(scale, weight), _per_channel(zero_point, weight), bits)
    return QuantizedWeight(codes.clamp_(*weight_codes(bits)).to(torch.uint8), scale, zero_point.to(torch.uint8), bits)


_SMALLEST_SCALE = 1e-20  # below it, float32 division by the scale overflows


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
