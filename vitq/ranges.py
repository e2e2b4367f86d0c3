"""Ranges of tensors, streamed: what values a graph's activations take, and which range to spend codes on.

One pass over the images finds the channels' ranges of LayerNorm outputs (for the fold) and every activation's extremes; a second one
fills a histogram of each. Neither holds on to images: memory is one batch and one histogram a tensor. The range of a width is the one
with the least squared error, found on the histogram by a coarse grid of (low, high) and finer ones around its best point.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitq.affine import choose_qparams, highest_code, weight_codes, weight_qparams
from vitq.artifacts import Layer
from vitq.errors import InputError
from vitq.graph import Graph, run
from vitq.graph.run import Intercept
from vitq.quantizers import Uniform
from vitq.rewrites import ChannelRange, couplings, fold_layernorms, foldable_norms, rescale_attention

Batches = Iterable[tuple[Tensor, Tensor | None]]
"""Batches of (images (B, 3, H, W) float32, labels (B,) or None) that can be gone through more than once."""

BINS = 2048
_SAMPLES = 100_000  # values of one tensor that a batch adds, evenly spread; the range covers the extremes in any case
_MARGIN = 1e-3  # of the first batch's range: a later batch that reaches just as far, as behind a fold, does not double the histogram
_SHRINKS = 16  # grid points a side in the coarse stage
_FINE = 7  # grid points a side in the fine stage
_WEIGHT_SHRINKS = 24  # ranges that are tried for a weight's channel
_CACHED = 400_000  # numbers that a processor's cache holds


@dataclass(frozen=True)
class Histogram:
    """How often values fell into `counts.numel()` equal bins over [low, high]; counts is float64, on the CPU.

    Where values were added with weights, counts holds the sums of their weights: whatever is fitted then weighs errors so.
    """

    low: float
    high: float
    counts: Tensor

    @property
    def width(self) -> float:
        """The width of a bin."""
        return (self.high - self.low) / self.counts.numel()

    @property
    def occupied(self) -> tuple[float, float]:
        """Where the lowest bin that holds something begins, and where the highest ends; (0, 0) where none does."""
        bins = self.counts.nonzero().flatten()
        return (self.low + self.width * int(bins[0]), self.low + self.width * (int(bins[-1]) + 1)) if len(bins) else (0.0, 0.0)

    @property
    def centers(self) -> Tensor:
        """The middle of each bin, float64."""
        return self.low + self.width * (torch.arange(self.counts.numel(), dtype=torch.float64) + 0.5)

    @cached_property
    def sums(self) -> Tensor:
        """Counts, values and squares of all bins below each edge, a value taken as its bin's middle: float64 (3, 1 + bins)."""
        powers = torch.stack([self.counts, self.counts * self.centers, self.counts * self.centers.square()])
        return torch.nn.functional.pad(powers.cumsum(1), (1, 0))


def fold(graph: Graph, batches: Batches) -> tuple[Graph, dict[str, Histogram]]:
    """Folds LayerNorms and rescales attention by the channel ranges that the images show, and gathers the activations' histograms.

    Args:
        graph: a rewritten graph.
        batches: the calibration images; gone through twice.

    Returns:
        The folded graph and a histogram of each activation, by `Operand.tensor`.
    """
    folded = folded_graph(graph, batches)
    return folded, histograms(folded, batches)


def folded_graph(graph: Graph, batches: Batches) -> Graph:
    """The graph that `fold` makes; the images are gone through once."""
    coupled = couplings(graph)
    rows = {side.linear for coupling in coupled for side in (coupling.first, coupling.second) if not side.columns}
    found = channel_ranges(graph, {*foldable_norms(graph), *rows}, batches)
    return fold_layernorms(rescale_attention(graph, coupled, found), found)


def channel_ranges(graph: Graph, names: Collection[str], batches: Batches) -> dict[str, ChannelRange]:
    """The lowest and highest value of each channel, the last axis, of the named nodes' outputs."""
    found: dict[str, ChannelRange] = {}

    def widen(name: str, value: Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1])
        low, high = rows.amin(0), rows.amax(0)
        if name in found:
            low, high = torch.minimum(low, found[name].low), torch.maximum(high, found[name].high)
        found[name] = ChannelRange(low, high)

    def watch(name: str) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            output = compute(*arguments)
            widen(name, output)
            return output

        return intercept

    go_through(graph, batches, {name: watch(name) for name in names})
    return found


def histograms(graph: Graph, batches: Batches) -> dict[str, Histogram]:
    """A histogram of every activation that a layer reads, by `Operand.tensor`.

    The first batch sets the range; where later values leave it, the range is doubled towards them and neighbouring bins are merged.
    """
    found, intercepts = watch_histograms(graph)
    go_through(graph, batches, intercepts)
    return found


def watch_histograms(graph: Graph) -> tuple[dict[str, Histogram], dict[str, Intercept]]:
    """Histograms of every activation that fill while the graph runs with the intercepts, by node name."""
    found: dict[str, Histogram] = {}
    first_reader: dict[str, str] = {}
    for layer in graph.layers:
        for operand in layer.activations:
            first_reader.setdefault(operand.tensor, layer.name)

    def watch(layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            for operand, value in zip(layer.activations, arguments, strict=False):
                if first_reader[operand.tensor] == layer.name:
                    found[operand.tensor] = add(found.get(operand.tensor), value)
            return compute(*arguments)

        return intercept

    return found, {graph.nodes[layer.name]: watch(layer) for layer in graph.layers}


def add(histogram: Histogram | None, value: Tensor, weight: Tensor | None = None) -> Histogram:
    """A histogram with the values of a tensor added, to None as to an empty one; a large tensor is sampled, its extremes are covered.

    Args:
        histogram: what was found so far.
        value: float32, any shape.
        weight: how much each value counts, not negative, of value's shape: 1 without it.
    """
    low, high = (float(end) for end in value.aminmax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        raise InputError("an activation is not finite for these images; look for damaged weights or images")
    if histogram is None:
        margin = _MARGIN * max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)  # a constant still needs bins of some width
        lowest = max(low - margin, 0.0) if low >= 0 else low - margin  # values of one sign keep it
        highest = min(high + margin, 0.0) if high <= 0 and low < 0 else high + margin
        histogram = Histogram(lowest, highest, torch.zeros(BINS, dtype=torch.float64))
    while low < histogram.low or high > histogram.high:
        histogram = _doubled(histogram, downwards=low < histogram.low)
    values = value.flatten()
    step = max(values.numel() // _SAMPLES, 1)
    while math.gcd(step, values.numel()) > 1:  # no common factor: it does not fall in step with the channels
        step += 1
    values = values[::step].float() if step > 1 else values.float()
    if weight is None:
        counts = torch.histc(values, bins=BINS, min=histogram.low, max=histogram.high)
    else:
        bins = ((values - histogram.low) / histogram.width).long().clamp_(0, BINS - 1)
        counts = torch.bincount(bins, weight.flatten()[::step].double(), minlength=BINS)
    return Histogram(histogram.low, histogram.high, histogram.counts + counts.double().cpu())


def activation_qparams(histogram: Histogram, bits: int) -> Uniform:
    """Scale and zero point with the least squared error over the histogram, among ranges inside [low, high] that hold 0."""
    low, high = min(histogram.occupied[0], 0.0), max(histogram.occupied[1], 0.0)
    if high - low <= 0:
        return Uniform(1.0, 0, bits)

    def error(lows: Tensor, highs: Tensor) -> Tensor:
        return _squared_error(histogram, *choose_qparams(lows, highs, bits), bits)

    best_low, best_high = _search(low, high, error)
    scale, zero_point = choose_qparams(torch.tensor(best_low), torch.tensor(best_high), bits)
    return Uniform(float(scale), int(zero_point), bits)


def weight_ranges(weight: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point (O,) of a weight (O, ...), each channel's range shrunk to its least squared error; see `weight_qparams`."""
    rows = weight.reshape(weight.shape[0], -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    smallest = {2: 0.3, 3: 0.4, 4: 0.5}.get(bits, 0.7)
    if symmetric and bits < 7:  # the grid of a signed type lacks one code above, so that its step is that much wider
        smallest *= (highest_code(bits) - 1) / highest_code(bits)
    shrinks = torch.linspace(1.0, smallest, _WEIGHT_SHRINKS, device=weight.device)
    scales, zero_points = weight_qparams(low[:, None] * shrinks, high[:, None] * shrinks, bits, symmetric)
    some = max(1, _CACHED // (_WEIGHT_SHRINKS * rows.shape[1]))  # channels at a time, so that all their candidates stay in the cache
    chunks = zip(rows.split(some), scales.split(some), zero_points.split(some), strict=True)
    best = torch.cat([_row_errors(*chunk, bits).argmin(1, keepdim=True) for chunk in chunks])
    return scales.gather(1, best)[:, 0], zero_points.gather(1, best)[:, 0]


def _row_errors(rows: Tensor, scales: Tensor, zero_points: Tensor, bits: int) -> Tensor:
    """The squared error of each row (O, I) under each of its candidates, scales and zero points (O, candidates)."""
    scale, zero_point = scales[:, :, None], zero_points[:, :, None]
    codes = (rows[:, None] / scale).round_().add_(zero_point).clamp_(*weight_codes(bits))
    error = codes.sub_(zero_point).mul_(scale).sub_(rows[:, None])
    return torch.linalg.vecdot(error, error)


def _squared_error(histogram: Histogram, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The sum of squared errors of all values, each taken as its bin's middle, for candidates (C,), float64 (C,).

    A level takes the bins whose middle lies nearest to it: its error is three differences of sums, whatever the number of bins.
    """
    scale, zero_point = scale.double()[:, None], zero_point.double()[:, None]
    codes = torch.arange(highest_code(bits) + 1) - zero_point  # (C, codes)
    first, bins = histogram.low + histogram.width / 2, histogram.counts.numel()
    ends = codes.new_zeros(len(codes), codes.shape[1] + 1, dtype=torch.int64)  # where each level's bins begin, and the last one's end
    ends[:, 1:-1] = (((codes[:, 1:] - 0.5) * scale - first) / histogram.width).ceil_().clamp_(0, bins)
    ends[:, -1] = bins
    count, total, squares = histogram.sums[:, ends].diff(dim=2)
    levels = codes * scale
    return (squares + levels * (levels * count - 2 * total)).sum(1)


def _search(low: float, high: float, error: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """The ends in [low, 0] and [0, high] with the least error: a geometric grid, then twice a finer one between its neighbours."""
    ratios = torch.logspace(0, -2, _SHRINKS)
    step = float(ratios[1])
    lows = low * ratios if low < 0 else torch.zeros(1)
    highs = high * ratios if high > 0 else torch.zeros(1)
    for _ in range(3):
        grid_low, grid_high = torch.meshgrid(lows, highs, indexing="ij")
        best = int(error(grid_low.flatten(), grid_high.flatten()).argmin())
        best_low, best_high = float(grid_low.flatten()[best]), float(grid_high.flatten()[best])
        around = step ** torch.linspace(1, -1, _FINE)  # the best point itself is in the middle
        step = float(around[_FINE // 2 - 1])
        lows = (best_low * around).clamp(min=low) if low < 0 else lows
        highs = (best_high * around).clamp(max=high) if high > 0 else highs
    return best_low, best_high


def _doubled(histogram: Histogram, downwards: bool) -> Histogram:
    merged = histogram.counts.reshape(-1, 2).sum(1)
    empty = torch.zeros_like(merged)
    width = histogram.high - histogram.low
    if downwards:
        return Histogram(histogram.low - width, histogram.high, torch.cat([empty, merged]))
    return Histogram(histogram.low, histogram.high + width, torch.cat([merged, empty]))


def go_through(graph: Graph, batches: Batches, intercepts: Mapping[str, Intercept]) -> None:
    """Runs the graph on all images, for what the intercepts make of it."""
    for images, _ in batches:
        with torch.no_grad():
            run(graph.module, images, intercepts)
