"""What the parameters of quantizers must be; a file may have been damaged or edited."""

import math

import torch

from vitq.affine import highest_code

_WIDTHS = range(2, 9)
_SMALLEST_SCALE = 1e-20  # below it, float32 division by the scale overflows


def check(quantizer: object, *conditions: bool) -> None:
    """Raises ValueError where a condition does not hold."""
    if not all(conditions):
        raise ValueError(f"{quantizer}: these parameters do not go together")


def is_width(bits: object) -> bool:
    """Whether it is a whole number from 2 to 8."""
    return type(bits) is int and bits in _WIDTHS


def is_scale(value: object) -> bool:
    """Whether it is a positive float that float32 holds exactly."""
    return isinstance(value, float) and _SMALLEST_SCALE <= value < math.inf and torch.tensor(value).item() == value


def is_code(value: object, bits: int) -> bool:
    """Whether it is a whole number in [0, 2^bits - 1]."""
    return type(value) is int and 0 <= value <= highest_code(bits)
