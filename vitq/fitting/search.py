"""Search of a quantizer's two parameters on a grid that refines around its best points, and the error that it minimises.

This is the Fast Progressive Combining Search of AdaLog (Wu et al., ECCV 2024): score a coarse grid of pairs, keep the best few, put a
finer grid around each, repeat. Both parameters are on a logarithmic scale here, since scales and bases differ by factors.
Differs from the paper: the error is that of the tensor over its histogram, where the paper runs the layer on each candidate.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import TypeVar

import torch

from vitq.quantizers import Quantizer
from vitq.ranges import Histogram

Kind = TypeVar("Kind", bound=Quantizer)

_KEPT = 4  # points around which the grid is refined
_STAGES = 5  # finer grids; each halves the spacing


def squared_error(histogram: Histogram, quantizer: Quantizer) -> float:
    """The sum of squared errors of all values, each taken as its bin's middle."""
    return _error(*_bins(histogram), quantizer)


def least(histogram: Histogram, candidates: Iterable[Kind]) -> Kind:
    """The candidate with the least squared error over the histogram; the first of equals."""
    x, counts = _bins(histogram)
    return min(candidates, key=lambda quantizer: _error(x, counts, quantizer))


def progressive_search(
    histogram: Histogram, candidates: Callable[[float, float], Sequence[Quantizer]], first: Sequence[float], second: Sequence[float]
) -> Quantizer:
    """The quantizer with the least squared error that a grid of pairs and its refinements find.

    Args:
        histogram: what the tensor holds.
        candidates: the quantizers to try at a pair of coordinates.
        first: evenly spaced coordinates of the coarse grid, rising; refinements stay between the ends.
        second: those of the other parameter; one alone is kept as it is.
    """
    x, counts = _bins(histogram)
    errors: dict[Quantizer, float] = {}
    scored: dict[tuple[float, float], tuple[float, Quantizer]] = {}

    def score(pair: tuple[float, float]) -> None:
        tried = candidates(*pair)
        for quantizer in tried:
            if quantizer not in errors:
                errors[quantizer] = _error(x, counts, quantizer)
        best = min(tried, key=errors.__getitem__)
        scored[pair] = errors[best], best

    def around(center: float, axis: Sequence[float], stage: int) -> list[float]:
        if len(axis) == 1:
            return [center]
        spacing = (axis[1] - axis[0]) / 2**stage
        return [min(max(center + step * spacing, axis[0]), axis[-1]) for step in (-1, 0, 1)]

    for pair in product(first, second):
        score(pair)
    for stage in range(1, _STAGES + 1):
        best = sorted(scored, key=lambda pair: scored[pair][0])[:_KEPT]
        for center in best:
            for pair in product(around(center[0], first, stage), around(center[1], second, stage)):
                if pair not in scored:
                    score(pair)
    return min(scored.values(), key=lambda found: found[0])[1]


def spaced(low: float, high: float, points: int) -> list[float]:
    """Evenly spaced coordinates from low to high."""
    return torch.linspace(low, high, points, dtype=torch.float64).tolist()


def as_scale(value: float) -> float:
    """The nearest number that a scale may be: float32, within [1e-20, 1e38]."""
    return torch.tensor(min(max(value, 2e-20), 1e38)).item()


def _bins(histogram: Histogram) -> tuple[torch.Tensor, torch.Tensor]:
    """The middles (float32) and the counts (float64) of the bins that hold something."""
    held = histogram.counts > 0
    return histogram.centers[held].float(), histogram.counts[held]


def _error(x: torch.Tensor, counts: torch.Tensor, quantizer: Quantizer) -> float:
    return float((quantizer.quantize_dequantize(x) - x).double().square() @ counts)
