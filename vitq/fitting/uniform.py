"""Ranges for the uniform quantizer: the ends of the data, quantiles, or the least squared error.

    scale = (high - low) / (2^bits - 1)        zero_point = round(-low / scale)

The values are known to a bin of the histogram.
"""

from collections.abc import Callable

import torch

from vitq.affine import choose_qparams
from vitq.fitting.search import least
from vitq.quantizers import Uniform
from vitq.ranges import Histogram, activation_qparams

_PERCENTILES = (0.999, 0.9999, 0.99999)


def fit_min_max(histogram: Histogram, bits: int) -> Uniform:
    """The range from the least to the greatest value."""
    return spanning(*histogram.occupied, bits)


def fit_percentile(histogram: Histogram, bits: int) -> Uniform:
    """The range between the quantiles 1 - p and p, p of 0.999, 0.9999 and 0.99999 with the least squared error: RepQ-ViT's search."""
    return least(histogram, [spanning(quantile(histogram, 1 - p), quantile(histogram, p), bits) for p in _PERCENTILES])


def fit_mse(histogram: Histogram, bits: int) -> Uniform:
    """The range with the least squared error (ranges.py)."""
    return activation_qparams(histogram, bits)


RANGES: dict[str, Callable[[Histogram, int], Uniform]] = {"min-max": fit_min_max, "percentile": fit_percentile, "mse": fit_mse}


def spanning(low: float, high: float, bits: int) -> Uniform:
    """The quantizer whose codes span [low, high], widened to hold 0."""
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), bits)
    return Uniform(float(scale), int(zero_point), bits)


def quantile(histogram: Histogram, level: float) -> float:
    """The value that a part `level` of all values lies below, in [0, 1]; values lie evenly inside a bin."""
    if not float(histogram.counts.sum()):
        return 0.0
    below = histogram.counts.cumsum(0)
    wanted = level * float(below[-1])
    index = min(int(torch.searchsorted(below, torch.tensor(wanted, dtype=torch.float64))), len(below) - 1)
    count = float(histogram.counts[index])
    inside = (wanted - float(below[index]) + count) / count if count else 0.0
    return histogram.low + histogram.width * (index + inside)
