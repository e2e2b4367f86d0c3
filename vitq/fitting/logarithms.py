"""Scale, base and shift of the logarithmic quantizers, and whether the last code is worth more as a 0.

The scale is searched around the greatest value, from a little above it, since the greatest power may round down to it, to some octaves
below; AdaLog's base together with it. Negative values of a tensor are shifted away by AdaLog alone.
Differs from the paper (AdaLog): q from 1 to 138 where the paper starts at 10; the shift is the tensor's least value, to a bin, which is
-0.16997 for a GELU whose inputs reach its minimum.
"""

import math

from vitq.fitting.search import as_scale, progressive_search, spaced
from vitq.quantizers import AdaLog, Log2, LogSqrt2, Quantizer
from vitq.quantizers.adalog import LARGEST_NUMERATOR
from vitq.ranges import Histogram

_ABOVE, _BELOW = 0.5, 4.0  # octaves of scales above and below the greatest value
_POINTS = 10  # a side of the coarse grid


def fit_log2(histogram: Histogram, bits: int) -> Quantizer:
    """The log2 quantizer with the least squared error."""
    return progressive_search(
        histogram, lambda scale, _: [Log2(as_scale(2**scale), bits, zero) for zero in (False, True)], _scales(histogram, 0.0), [0.0]
    )


def fit_log_sqrt2(histogram: Histogram, bits: int) -> Quantizer:
    """The log-sqrt2 quantizer with the least squared error."""
    return progressive_search(
        histogram, lambda scale, _: [LogSqrt2(as_scale(2**scale), bits, zero) for zero in (False, True)], _scales(histogram, 0.0), [0.0]
    )


def fit_adalog(histogram: Histogram, bits: int) -> Quantizer:
    """The AdaLog quantizer with the least squared error, shifted where the tensor has negative values."""
    low = histogram.occupied[0]
    shift = as_scale(-low) if low < 0 else 0.0

    def candidates(scale: float, base: float) -> list[Quantizer]:
        return [AdaLog(as_scale(2**scale), round(2**base), bits, shift, zero) for zero in (False, True)]

    return progressive_search(histogram, candidates, _scales(histogram, shift), spaced(0.0, math.log2(LARGEST_NUMERATOR), _POINTS))


def _scales(histogram: Histogram, shift: float) -> list[float]:
    greatest = math.log2(as_scale(histogram.occupied[1] + shift))
    return spaced(greatest - _BELOW, greatest + _ABOVE, _POINTS)
