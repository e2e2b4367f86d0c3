"""Fits quantizers to what a tensor holds, told by its histogram: the least squared error among a kind's parameters.

A histogram whose counts are sums of weights makes it a weighted error (importance.py). The power-of-two factors, which need every
channel, have their own two functions (factors.py). Weights are rounded by what the layer reads (weights.py).
"""

from collections.abc import Callable, Collection, Iterable, Mapping

from vitq.artifacts import Layer, Role
from vitq.fitting.log_grid import fit_log_grid
from vitq.fitting.logarithms import fit_adalog, fit_log2, fit_log_sqrt2
from vitq.fitting.observe import observe
from vitq.fitting.search import least, squared_error
from vitq.fitting.twin import fit_twin_uniform
from vitq.fitting.twin_grid import fit_twin_grid
from vitq.fitting.uniform import RANGES, fit_mse
from vitq.fitting.weights import fit_weights, input_covariances
from vitq.quantizers import IntegerQuantizer, Quantizer
from vitq.ranges import Histogram

__all__ = ["FITS", "RANGES", "fit", "fit_operand", "fit_weights", "input_covariances", "observe", "relative_error", "roles"]

FITS: dict[str, Callable[[Histogram, int], Quantizer]] = {
    "uniform": fit_mse,
    "log2": fit_log2,
    "log-sqrt2": fit_log_sqrt2,
    "adalog": fit_adalog,
    "twin-uniform": fit_twin_uniform,
    "log-grid": fit_log_grid,
    "twin-grid": fit_twin_grid,
}

_WORTH = 0.8
"""Other codes cost two more ops than equal steps do: they are taken where they have at most this part of their squared error."""

_OTHER: dict[Role, Callable[[Histogram, int], IntegerQuantizer]] = {"post_softmax": fit_log_grid, "post_gelu": fit_twin_grid}


def fit(histogram: Histogram, bits: int, allowed: Collection[str] = ("uniform",)) -> Quantizer:
    """The quantizer with the least squared error over the histogram, of the kinds that are allowed (names in `FITS`)."""
    return least(histogram, [FITS[name](histogram, bits) for name in allowed])


def fit_operand(histogram: Histogram, bits: int, role: Role) -> IntegerQuantizer:
    """What `calibrate` quantizes an operand of a role with by default: equal steps, or other codes where those are worth it."""
    uniform = fit_mse(histogram, bits)
    if role not in _OTHER:
        return uniform
    other = _OTHER[role](histogram, bits)
    return other if squared_error(histogram, other) <= _WORTH * squared_error(histogram, uniform) else uniform


def roles(layers: Iterable[Layer]) -> Mapping[str, Role]:
    """The role of every activation that the layers read, by `Operand.tensor`."""
    return {operand.tensor: operand.role for layer in layers for operand in layer.activations}


def relative_error(histogram: Histogram, quantizer: Quantizer) -> float:
    """The power of the quantization error over that of the tensor itself, from its histogram."""
    return squared_error(histogram, quantizer) / max(float(histogram.sums[2, -1]), 1e-30)
