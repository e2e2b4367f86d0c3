"""Recipe `mix-qvit`: RepQ-ViT's, with clipped channels behind LayerNorms (Mix-QViT, arXiv 2501.06357).

A few outlying channels pull the common scale s* and zero point z* of a LayerNorm's output (channelwise.py). They are clipped first,

    s_c <- clip(s_c, mean(s) - k sd(s), mean(s) + k sd(s))        z_c <- round(clip(z_c, mean(z) - k sd(z), mean(z) + k sd(z)))

so that what these channels hold beyond the range saturates; the fold stays exact in float for every k. Of k = 1, 1.5, 2, 2.5, 3 and
infinity, each LayerNorm gets the one with the least squared error of the layers that read it,

    sum over readers |W (x + t) - W'^ (x^ + t) / r|^2

with r and t those of the fold and W'^ the folded weight in its codes. k = infinity clips nothing: recipe `repq-vit`.
Differs from the paper: it gives no rule for the clip, so this one and the search for k are our choice; no quantization-aware training.
"""

import math

import torch
from torch import Tensor

from vitq.affine import quantize_weight
from vitq.artifacts import BitPlan
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.channelwise import Channels, fold_channelwise, folded_weights
from vitq.checkpoint import Checkpoint
from vitq.fitting.percentile import percentile_weights
from vitq.graph import Graph
from vitq.ranges import Batches

CLIPS = (math.inf, 3.0, 2.5, 2.0, 1.5, 1.0)
"""The k that are tried; of equals the first is taken."""

_ROWS = 4096  # tokens that the outputs' errors are taken from, evenly spread
_SMALLEST_SCALE = 1e-8


def calibrate_mix_qvit(
    graph: Graph,
    plan: BitPlan,
    batches: Batches,
    symmetric: bool = False,
    clips: tuple[float, ...] = CLIPS,
    progress: Progress | None = None,
) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images; held in memory.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.
        clips: the k to choose from, positive.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)

    def choose(channels: Channels, output: Tensor, readers: list[tuple[Tensor, int]]) -> Channels:
        rows = output.reshape(-1, output.shape[-1])
        some = rows[:: max(len(rows) // _ROWS, 1)]
        return min((clipped(channels, k) for k in clips), key=lambda candidate: readers_error(candidate, some, readers, symmetric))

    folded, activations = fold_channelwise(graph, plan, batches, choose=choose, progress=progress)
    return assemble(folded, plan, folded_weights(folded, plan, symmetric), activations)


def clipped(channels: Channels, k: float) -> Channels:
    """The channels with scales and zero points at most k standard deviations from their means; unchanged for k infinite."""
    if math.isinf(k):
        return channels
    scale = _clip(channels.scale, k).clamp(min=_SMALLEST_SCALE)
    return Channels(scale, _clip(channels.zero_point, k).round(), channels.bits)


def readers_error(channels: Channels, x: Tensor, readers: list[tuple[Tensor, int]], symmetric: bool = False) -> float:
    """The squared error of what the readers make of a norm's output (tokens, C), quantized and folded; weights (O, C) with their bits."""
    ratio, shift = (factor.float() for factor in channels.factors)
    read, total = (channels.quantize_dequantize(x) + shift) / ratio, 0.0
    for weight, bits in readers:
        folded = weight * ratio
        quantized = quantize_weight(folded, *percentile_weights(folded, bits, symmetric), bits).dequantize()
        total += float((read @ quantized.T - (x + shift) @ weight.T).square().sum(dtype=torch.float64))
    return total


def _clip(values: Tensor, k: float) -> Tensor:
    mean, spread = values.mean(), values.std(correction=0)
    return values.clamp(mean - k * spread, mean + k * spread)
