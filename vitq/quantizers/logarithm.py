"""Codes that count equal steps of the logarithm, which the quantizers log2, log-sqrt2 and AdaLog share.

    codes = clip(round(-log2(x / scale) / step), 0, 2^bits - 1)        x^ = scale 2^(-step codes)

The base of the logarithm is 2^step. Nothing below 0 has a logarithm: it gets the last code, as 0 does. With `holds_zero` the last code
stands for 0 itself and not for scale 2^(-step (2^bits - 1)). At 2 and 3 bits that is worth a code, since the last power is far from 0
and most of a softmax is not; above, the last power is next to nothing.

Differs from the papers' code: that clips codes to 2^bits - 1 and then maps what lay beyond to 0, 2^bits + 1 values in all. Powers
that float32 cannot tell from 0 are 0.
"""

import math

import torch
from torch import Tensor

from vitq.affine import highest_code

_SMALLEST = 2.0**-126  # the smallest float32 that has all its digits


def log_codes(x: Tensor, scale: float, step: float, bits: int) -> Tensor:
    """The codes of the module's equation."""
    return ((math.log2(scale) - x.clamp(min=0).log2()) / step).round_().clamp_(0, highest_code(bits))


def log_values(codes: Tensor, scale: float, step: float, bits: int, holds_zero: bool, smallest: float = _SMALLEST) -> Tensor:
    """The values of the module's equation, 0 where they are below `smallest`."""
    values = torch.exp2(codes * -step) * scale
    values = torch.nn.functional.threshold(values, smallest, 0.0)
    return values * (codes < highest_code(bits)) if holds_zero else values
