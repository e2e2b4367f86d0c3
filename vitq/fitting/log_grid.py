"""Step, offset and scale of the logarithmic grid for softmax with the least squared error over a histogram.

All pairs of a coarse grid of steps and offsets are judged at once, then those of a finer one around the best. A code takes the bins
whose middle lies between its bounds, exp(-step (c + offset ± 1/2)), so that three sums a code are enough, and the best scale for them is

    scale = sum y x / sum y^2,        y = grid(c) - grid(2^bits - 1)

Pairs of which a power lies at a rounding tie of the grid are left out: another runtime's exponential could round it otherwise.
"""

import math

import torch
from torch import Tensor

from vitq.affine import highest_code
from vitq.fitting.search import as_scale
from vitq.quantizers import LogGrid
from vitq.quantizers.log_grid import TOP
from vitq.ranges import Histogram

_STEPS = (0.03, 2.5)  # of the logarithm, in nats
_DEEPEST = 6.5  # nats from 1 to the largest power
_POINTS = 40  # steps, and offsets, of the coarse grid
_FINE = 9  # of the finer one
_TIE = 1e-3


def fit_log_grid(histogram: Histogram, bits: int) -> LogGrid:
    """The quantizer; values below 0 count as 0, which a softmax has none of."""
    coarse = torch.logspace(math.log10(_STEPS[0]), math.log10(_STEPS[1]), _POINTS, dtype=torch.float64)
    depths = torch.linspace(0, _DEEPEST, _POINTS, dtype=torch.float64)
    best = _least(histogram, bits, coarse, depths)
    around = best.step * float(coarse[1] / coarse[0]) ** torch.linspace(-1, 1, _FINE, dtype=torch.float64)
    nearby = best.step * best.offset + float(depths[1]) * torch.linspace(-1, 1, _FINE, dtype=torch.float64)
    return _least(histogram, bits, torch.cat([around, torch.tensor([best.step], dtype=torch.float64)]), nearby.clamp(min=0))


def _least(histogram: Histogram, bits: int, steps: Tensor, depths: Tensor) -> LogGrid:
    """The quantizer with the least error among all pairs of a step and an offset nearest to a depth."""
    highest = highest_code(bits)
    step, depth = (axis.flatten() for axis in torch.meshgrid(steps.float().double(), depths, indexing="ij"))
    offset = (depth / step).round().clamp(max=TOP - highest)
    codes = torch.arange(highest + 1, dtype=torch.float64)
    powers = TOP * torch.exp(-step[:, None] * codes)
    value = powers.round() - powers[:, -1:].round()  # (pairs, codes), falling

    bounds = torch.exp(-step[:, None] * (codes[:-1] + offset[:, None] + 0.5))  # between a code and the next
    bins, first = histogram.counts.numel(), histogram.low + histogram.width / 2
    ends = torch.zeros(len(step), highest + 2, dtype=torch.int64)  # falling, as values are
    ends[:, 0] = bins
    ends[:, 1:-1] = ((bounds - first) / histogram.width).ceil().clamp(0, bins)
    count, total, _ = -histogram.sums[:, ends].diff(dim=2)

    product, power = (value * total).sum(1), (value.square() * count).sum(1)
    tied = ((powers - powers.floor() - 0.5).abs() < _TIE).any(1)
    explained = torch.where(tied | (power <= 0) | (product <= 0), -1.0, product.square() / power.clamp(min=1e-300))
    at = int(explained.argmax())
    scale = float(product[at] / power[at]) if float(explained[at]) > 0 else 1.0
    return LogGrid(as_scale(scale), as_scale(float(step[at])), int(offset[at]), bits)
