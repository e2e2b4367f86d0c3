"""Fits quantizers to what a tensor holds, told by its histogram: the least squared error among a kind's parameters.

A histogram whose counts are sums of weights makes it a weighted error (importance.py). The power-of-two factors, which need every
channel, have their own two functions (factors.py).
"""

from collections.abc import Callable, Collection

from vitq.fitting.logarithms import fit_adalog, fit_log2, fit_log_sqrt2
from vitq.fitting.search import least
from vitq.fitting.twin import fit_twin_uniform
from vitq.fitting.uniform import RANGES, fit_mse
from vitq.quantizers import Quantizer
from vitq.ranges import Histogram

__all__ = ["FITS", "RANGES", "fit"]

FITS: dict[str, Callable[[Histogram, int], Quantizer]] = {
    "uniform": fit_mse,
    "log2": fit_log2,
    "log-sqrt2": fit_log_sqrt2,
    "adalog": fit_adalog,
    "twin-uniform": fit_twin_uniform,
}


def fit(histogram: Histogram, bits: int, allowed: Collection[str] = ("uniform",)) -> Quantizer:
    """The quantizer with the least squared error over the histogram, of the kinds that are allowed (names in `FITS`)."""
    return least(histogram, [FITS[name](histogram, bits) for name in allowed])
