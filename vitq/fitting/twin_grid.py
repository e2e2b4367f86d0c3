"""Scale, zero point, knee and ratio of the twin grid with the least squared error over a histogram.

All combinations of some ratios, knees, spans and depths are judged at once, then knees and spans around the best. A code takes the bins
whose middle lies between its bounds, half way to the codes beside it, so that three sums a code are enough:

    error = sum x^2 - 2 sum y x + sum y^2
"""

import math
from collections.abc import Iterable, Sequence
from itertools import product

import torch
from torch import Tensor

from vitq.affine import highest_code
from vitq.fitting.search import as_scale, least
from vitq.quantizers import TwinGrid
from vitq.quantizers.twin_grid import TOP
from vitq.ranges import Histogram

_RATIOS = (3, 5, 7, 9)
_KNEES = 12  # at most, evenly spread
_SPANS = torch.logspace(-1.5, 0, 24, dtype=torch.float64)  # parts of the range above 0 that codes reach, coarse
_FINE = 9
_DEPTHS = torch.linspace(0, 1, 5, dtype=torch.float64)  # parts of the range below 0


def fit_twin_grid(histogram: Histogram, bits: int) -> TwinGrid:
    """The quantizer; of 8 bits, which leave the grid no room for coarse steps, all steps are fine."""
    highest = highest_code(bits)
    knees = sorted({round(1 + (highest - 2) * part / (_KNEES - 1)) for part in range(_KNEES)})
    best = _least(histogram, bits, _shapes(_RATIOS, knees, highest) or [(3, highest)], _SPANS)
    apart = math.ceil(highest / (_KNEES - 1))  # two knees tried, at most
    near = range(max(best.knee - apart + 1, 1), min(best.knee + apart, highest))
    reach = best.scale * (best.knee - best.zero_point + best.ratio * (highest - best.knee)) / max(histogram.occupied[1], 1e-30)
    around = reach * float(_SPANS[1] / _SPANS[0]) ** torch.linspace(-1, 1, _FINE, dtype=torch.float64)
    return least(histogram, [best, _least(histogram, bits, _shapes([best.ratio], near, highest) or [(3, highest)], around)])


def _shapes(ratios: Iterable[int], knees: Iterable[int], highest: int) -> list[tuple[int, int]]:
    """The pairs of a ratio and a knee that the grid has room for."""
    return [(ratio, knee) for ratio, knee in product(ratios, knees) if knee + ratio * (highest - knee) <= TOP]


def _least(histogram: Histogram, bits: int, shapes: Sequence[tuple[int, int]], spans: Tensor) -> TwinGrid:
    """The quantizer with the least error among all combinations of a shape (ratio, knee), a span and a depth below 0."""
    low, high = histogram.occupied
    highest, most = highest_code(bits), max(high, -low, 1e-30)
    at, span, depth = (axis.flatten() for axis in torch.meshgrid(torch.arange(len(shapes)).double(), spans, _DEPTHS, indexing="ij"))
    ratio, knee = torch.tensor(shapes, dtype=torch.float64)[at.long()].unbind(1)
    steps = knee + ratio * (highest - knee)  # from the lowest code to the highest
    below = depth * max(-low, 0.0)
    scale = torch.maximum((span * max(high, 0.0) + below) / steps, below / knee).clamp(min=1e-3 * most / TOP)
    zero = torch.minimum((below / scale).round(), knee)
    codes = torch.arange(highest + 1, dtype=torch.float64)
    grid = codes + (codes - knee[:, None]).clamp(min=0) * (ratio[:, None] - 1) - zero[:, None]
    value = grid * scale[:, None]  # (candidates, codes), rising

    bins, first = histogram.counts.numel(), histogram.low + histogram.width / 2
    ends = torch.zeros(len(scale), highest + 2, dtype=torch.int64)
    ends[:, -1] = bins
    ends[:, 1:-1] = (((value[:, 1:] + value[:, :-1]) / 2 - first) / histogram.width).ceil().clamp(0, bins)
    count, total, _ = histogram.sums[:, ends].diff(dim=2)
    error = (value.square() * count - 2 * value * total).sum(1)
    best = int(error.argmin())
    return TwinGrid(as_scale(float(scale[best])), int(zero[best]), int(knee[best]), int(ratio[best]), bits)
