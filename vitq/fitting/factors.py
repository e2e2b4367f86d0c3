"""The power-of-two factors of FQ-ViT (Lin et al., IJCAI 2022, Power-of-Two Factor), channel by channel.

    scale = (high - low) / (2^bits - 1) / 2^3        a_c = argmin over a in 0..3 of |x_c - Q(x_c; 2^a scale)|^2

with low and high the tensor's ends. Errors add up over batches, so that no values are kept: sum `channel_errors` over the images and give
the sum to `power_of_two_factor`.
"""

import torch
from torch import Tensor

from vitq.affine import quantize_dequantize
from vitq.fitting.search import as_scale
from vitq.fitting.uniform import spanning
from vitq.quantizers import PowerOfTwoFactor
from vitq.quantizers.power_of_two_factor import LARGEST_EXPONENT


def channel_errors(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """The squared error of each channel under each exponent, float64 (4, channels).

    Args:
        x: values (..., channels).
        low: the least value of the whole tensor, over all images.
        high: the greatest one.
        bits: 2 to 8.
    """
    scale, zero_point = _widest(low, high, bits)
    rows = x.reshape(-1, x.shape[-1])
    moved = (quantize_dequantize(rows, scale * 2**exponent, zero_point, bits) for exponent in range(LARGEST_EXPONENT + 1))
    return torch.stack([(values - rows).double().square().sum(0) for values in moved])


def power_of_two_factor(low: float, high: float, bits: int, errors: Tensor) -> PowerOfTwoFactor:
    """The quantizer whose exponents have the least errors, (4, channels) as `channel_errors` returns them."""
    return PowerOfTwoFactor(*_widest(low, high, bits), bits, tuple(errors.argmin(0).tolist()))


def _widest(low: float, high: float, bits: int) -> tuple[float, int]:
    """The scale at exponent 0, and the zero point."""
    whole = spanning(low, high, bits)
    return as_scale(whole.scale / 2**LARGEST_EXPONENT), whole.zero_point
