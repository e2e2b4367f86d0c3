"""Fits quantizers to what a tensor holds, told by its histogram: the least squared error among a kind's parameters.

A histogram whose counts are sums of weights makes it a weighted error (importance.py). The power-of-two factors, which need every
channel, have their own two functions (factors.py). Weights are rounded by what the layer reads (weights.py).
"""

from collections.abc import Callable, Collection, Iterable, Mapping

from vitq.affine import highest_code
from vitq.artifacts import Layer, Role
from vitq.fitting.logarithms import fit_adalog, fit_log2, fit_log_sqrt2
from vitq.fitting.observe import observe
from vitq.fitting.search import least, squared_error
from vitq.fitting.twin import fit_twin_uniform
from vitq.fitting.twin_grid import fit_twin_grid
from vitq.fitting.uniform import RANGES, fit_mse
from vitq.fitting.weights import fit_weights, input_covariances
from vitq.quantizers import IntegerQuantizer, Quantizer, RowSquares
from vitq.ranges import Histogram

__all__ = ["FITS", "RANGES", "fit", "fit_operand", "fit_weights", "input_covariances", "observe", "relative_error", "roles"]

FITS: dict[str, Callable[[Histogram, int], Quantizer]] = {
    "uniform": fit_mse,
    "log2": fit_log2,
    "log-sqrt2": fit_log_sqrt2,
    "adalog": fit_adalog,
    "twin-uniform": fit_twin_uniform,
    "twin-grid": fit_twin_grid,
}

_WORTH = 0.8
"""Two step sizes cost two more ops than one does: they are taken where they have at most this part of its squared error."""


def fit(histogram: Histogram, bits: int, allowed: Collection[str] = ("uniform",)) -> Quantizer:
    """The quantizer with the least squared error over the histogram, of the kinds that are allowed (names in `FITS`)."""
    return least(histogram, [FITS[name](histogram, bits) for name in allowed])


def fit_operand(histogram: Histogram, bits: int, role: Role) -> IntegerQuantizer:
    """What `calibrate` quantizes an operand of a role with by default.

    Equal steps; below 8 bits a softmax has rows of squares, and a GELU has two step sizes where they are worth it.
    """
    if role == "post_softmax" and bits < 8:
        return RowSquares(bits)
    uniform = fit_mse(histogram, bits)
    if role != "post_gelu":
        return uniform
    twin = fit_twin_grid(histogram, bits)
    return twin if squared_error(histogram, twin) <= _WORTH * squared_error(histogram, uniform) else uniform


def roles(layers: Iterable[Layer]) -> Mapping[str, Role]:
    """The role of every activation that the layers read, by `Operand.tensor`."""
    return {operand.tensor: operand.role for layer in layers for operand in layer.activations}


def relative_error(histogram: Histogram, quantizer: Quantizer) -> float:
    """The power of the quantization error over that of the tensor itself, from its histogram.

    No histogram tells of rows. With errors of row-squares that are even in a step, of width 2 sqrt(p max p) / H at p, and those of integers
    that are not whole squares in max p / T, a row of N values has the error max p / (3 H^2) + N (max p)^2 / (12 T^2). Its max p is about
    sum p^2, as it is of a row of equal values and zeros, and sum p is 1.
    """
    if isinstance(quantizer, RowSquares):
        squares, rounded = highest_code(quantizer.bits) ** 2, quantizer.top < highest_code(quantizer.bits) ** 2
        count, total, power = (float(part[-1]) for part in histogram.sums)
        return 1 / (3 * squares) + rounded * power * count / max(total**2, 1e-30) / (12 * quantizer.top**2)
    return squared_error(histogram, quantizer) / max(float(histogram.sums[2, -1]), 1e-30)
