"""The two steps of the twin-uniform quantizer.

A tensor without negative values (softmax) gets an upper range around its greatest value and a lower one up to 2^19 times finer, the span
that PTQ4ViT tries; one with negative values (GELU) a range for either sign, each from the data's end down to a 32nd of it.
Differs from the paper: both steps are searched, where the paper's upper range of a softmax ends at 1 and its lower one of a GELU at -0.17.
"""

import math

from vitq.fitting.search import as_scale, progressive_search, spaced
from vitq.quantizers import Quantizer, TwinUniform
from vitq.ranges import Histogram

_FINEST = 19.0  # octaves between the two steps
_SHRUNK = 5.0  # octaves from the data's end to the shortest range
_POINTS = 10  # a side of the coarse grid


def fit_twin_uniform(histogram: Histogram, bits: int) -> Quantizer:
    """The twin-uniform quantizer with the least squared error."""
    low, high = histogram.occupied
    codes = 2 ** (bits - 1) - 1
    uppers = _steps(high / codes)
    if low < 0:
        return progressive_search(
            histogram,
            lambda upper, lower: [TwinUniform(as_scale(2**lower), as_scale(2**upper), bits, negative=True)],
            uppers,
            _steps(-low / codes),
        )
    return progressive_search(
        histogram,
        lambda upper, finer: [TwinUniform(as_scale(2 ** (upper - finer)), as_scale(2**upper), bits)],
        uppers,
        spaced(0.0, _FINEST, 2 * _POINTS),
    )


def _steps(longest: float) -> list[float]:
    end = math.log2(as_scale(longest))
    return spaced(end - _SHRUNK, end + 0.5, _POINTS) if longest > 0 else [end]
