"""Ranges between two quantiles of the values themselves: the search of RepQ-ViT's code (Li et al., ICCV 2023).

    low = quantile(x, 1 - p)        high = quantile(x, p)        p of 0.999, 0.9999 and 0.99999 with the least squared error

for a whole tensor, for each channel of one, or for each row of a weight. `uniform.fit_percentile` knows the values to a bin of a
histogram only, and no channels; here they are sorted, so memory grows with their number.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vitq.affine import choose_qparams, highest_code, weight_codes, weight_qparams
from vitq.fitting.search import as_scale
from vitq.quantizers import LogSqrt2, Uniform

PERCENTILES = (0.999, 0.9999, 0.99999)


def percentile_uniform(x: Tensor, bits: int) -> Uniform:
    """The uniform quantizer of a tensor of any shape, its range widened to hold 0."""
    scale, zero_point = _searched(x.reshape(1, -1), lambda low, high: choose_qparams(low, high, bits), (0, highest_code(bits)))
    return Uniform(float(scale), int(zero_point), bits)


def percentile_channels(x: Tensor, bits: int, shiftable: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point, of any sign, of each channel, (C,) of (..., C); all zero points 2^(bits - 1) without `shiftable`."""

    def qparams(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not shiftable:
            low, high = -torch.maximum(low.abs(), high.abs()), torch.maximum(low.abs(), high.abs())
        scale = (high - low) / highest_code(bits)
        size = torch.where(high == 0, torch.ones_like(high), high.abs())
        scale = torch.where(high - low > 1e-6 * size, scale, size)  # a constant is one step
        return scale, (-low / scale).round() if shiftable else torch.full_like(scale, 2.0 ** (bits - 1))

    return _searched(x.reshape(-1, x.shape[-1]).T.contiguous(), qparams, (0, highest_code(bits)))


def percentile_weights(weight: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point (O,) of a weight (O, ...), as `affine.weight_qparams` has them."""
    rows = weight.reshape(weight.shape[0], -1)
    return _searched(rows, lambda low, high: weight_qparams(low, high, bits, symmetric), weight_codes(bits))


def percentile_log_sqrt2(x: Tensor, bits: int) -> LogSqrt2:
    """The log-sqrt2 quantizer whose scale is one of the upper quantiles; the last code is 0 where that has the less squared error."""
    _, highs = _quantiles(x.reshape(1, -1))
    candidates = [LogSqrt2(as_scale(float(high)), bits, zero) for high in highs[0] for zero in (True, False)]
    return min(candidates, key=lambda quantizer: float((quantizer.quantize_dequantize(x) - x).square().sum(dtype=torch.float64)))


def _searched(rows: Tensor, qparams: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], codes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Scale and zero point (R,) of each row of (R, N) with the least squared error."""
    scales, zero_points = qparams(*_quantiles(rows))
    errors = []
    for scale, zero_point in zip(scales.T[:, :, None], zero_points.T[:, :, None], strict=True):
        moved = (rows / scale).round_().add_(zero_point).clamp_(*codes).sub_(zero_point).mul_(scale)
        errors.append(moved.sub_(rows).square_().sum(1, dtype=torch.float64))
    best = torch.stack(errors, 1).argmin(1, keepdim=True)
    return scales.gather(1, best)[:, 0], zero_points.gather(1, best)[:, 0]


def _quantiles(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper quantiles of each row (R, N), interpolated as numpy's: two float32 (R, 3)."""
    ordered = rows.float().sort(1).values
    last = rows.shape[1] - 1
    levels = torch.tensor([*(1 - p for p in PERCENTILES), *PERCENTILES], dtype=torch.float64) * last
    below = levels.floor().long().to(rows.device)
    part = (levels - levels.floor()).float().to(rows.device)
    found = torch.lerp(ordered[:, below], ordered[:, (below + 1).clamp(max=last)], part)
    low, high = found.split(len(PERCENTILES), 1)
    return low, high
