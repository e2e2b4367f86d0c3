"""Signal to quantization noise at each layer's output, inverted: what share of the output's power is quantization error.

    cost(l, b) = sum_n |y^_n - y_n|^2 / sum_n |y_n|^2 = 1 / SQNR

y is the layer's output without its bias, y^ the same with operands quantized; the weight alone, the inputs alone and both are measured.
In decibels the SQNR is -10 log10 of the cost. How far the error reaches into the network is not looked at, nor the moments that
calibration restores.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitq.artifacts import CostTable, Layer
from vitq.graph import run
from vitq.graph.run import Intercept
from vitq.importance.costs import table
from vitq.importance.quantizers import Quantizers
from vitq.importance.subject import Subject


def sqnr(subject: Subject) -> CostTable:
    """Prices every layer by the noise-to-signal power of its output.

    Returns:
        Costs that rank ("relative"), 1 being noise as strong as the signal.
    """
    graph, quantizers = subject.graph, Quantizers.of(subject, subject.bits)
    noise = {layer.name: np.zeros((3, len(subject.bits))) for layer in graph.layers}  # rows: both, the weight, the inputs
    signal = {layer.name: 0.0 for layer in graph.layers}

    def watch(layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            plain = quantizers.output(layer, compute, arguments, None, None)
            signal[layer.name] += float(plain.double().square().sum())
            for column, width in enumerate(subject.bits):
                for row, bits in enumerate(_cases(layer, width)):
                    error = quantizers.output(layer, compute, arguments, *bits).sub_(plain)
                    noise[layer.name][row, column] += float(error.double().square().sum())
            return compute(*arguments)

        return intercept

    for images, _ in subject.batches:
        with torch.no_grad():
            run(graph.module, images, {graph.nodes[layer.name]: watch(layer) for layer in graph.layers})
    tied, weight, activation = ({name: found[row] / max(signal[name], 1e-30) for name, found in noise.items()} for row in range(3))
    return table(subject, "relative", weight, activation, tied)


def _cases(layer: Layer, width: int) -> list[tuple[int | None, int | None]]:
    """The widths of weight and inputs that are measured; a matmul's inputs go together."""
    return [(width, width), (width, None), (None, width)] if layer.has_weight else [(None, width)]
