"""The layers that hurt, close up: what values their weights and inputs have in the float model and in the calibrated one.

Before: the float model as it was given. After, a weight: what is stored, folded and rounded. After, an input: what the calibrated graph
reads there before it is quantized, with its LayerNorms folded, beside the levels that the quantizer has for it.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vitq.checkpoint import Checkpoint
from vitq.graph import Graph
from vitq.quantizers import RowSquares
from vitq.ranges import BINS, Batches, Histogram, add, histograms
from vitq.report.findings import Bars, CloseUp, Panel

_BARS = 75
_MANY = 32  # levels; more of them stand closer than can be drawn


def close_ups(floats: Graph, checkpoint: Checkpoint, names: Iterable[str], batches: Batches | None) -> tuple[CloseUp, ...]:
    """Histograms of the named layers' weights, and of their inputs where there are images.

    Args:
        floats: the float model's graph, prepared but not folded.
        checkpoint: what was made of it.
        names: the layers.
        batches: images, gone through twice; None for weights alone.
    """
    seen = [histograms(graph, batches) if batches is not None else {} for graph in (floats, checkpoint.graph)]
    layers = [{layer.name: layer for layer in graph.layers} for graph in (floats, checkpoint.graph)]
    found = []
    for name in names:
        before, after = (known[name] for known in layers)
        panels = []
        if before.has_weight:
            given, stored = floats.module.state_dict()[before.operands[1].tensor], checkpoint.weights[name].dequantize()
            panels.append(Panel("weight", _bars(add(None, given.detach())), _bars(add(None, stored))))
        for number, (one, other) in enumerate(zip(before.activations, after.activations, strict=True)):
            if batches is not None:
                title = "input" if before.has_weight else ("left input", "right input")[number]
                quantizer = checkpoint.activations[other.tensor]
                shown = 2**quantizer.bits <= _MANY and not isinstance(quantizer, RowSquares)  # whose levels are other ones in each row
                levels = quantizer.dequantize(torch.arange(2.0**quantizer.bits)) if shown else torch.empty(0)
                panels.append(Panel(title, _bars(seen[0][one.tensor]), _bars(seen[1][other.tensor]), _plain(levels)))
        found.append(CloseUp(name, tuple(panels)))
    return tuple(found)


def _bars(histogram: Histogram) -> Bars:
    """Where values lie, in fewer and wider bins."""
    low, high = histogram.occupied
    edges = np.linspace(histogram.low, histogram.high, BINS + 1)
    below = np.interp(np.linspace(low, high, _BARS + 1), edges, histogram.sums[0].numpy())
    return Bars(low, high, tuple(map(float, np.diff(below).clip(min=0))))


def _plain(levels: Tensor) -> tuple[float, ...]:
    return tuple(sorted({float(level) for level in levels}))
