"""The codes that weights get: least-squares ranges for each output channel, and rounding that knows what the layer reads.

A linear whose inputs' covariance is known is rounded with compensation (compensation.py); a convolution, or one without, to nearest.
The covariance is that of the float network's inputs, one for all widths and plans: what a metric prices is what calibration makes.
Compensation from the quantized network's own inputs gains little more, for a pass over the images for each layer (docs/log.md).
"""

from collections.abc import Callable, Mapping, Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, quantize_weight
from vitq.fitting.compensation import compensated_widths
from vitq.graph import Graph, run, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.graph.run import Intercept
from vitq.ranges import Batches, weight_ranges

_ROWS = 2048  # tokens of a batch that a covariance is taken from, evenly spread


def fit_weights(
    graph: Graph, covariances: Mapping[str, Tensor], layer: str, bits: Sequence[int], symmetric: bool = False
) -> list[QuantizedWeight]:
    """A layer's weight at each of `bits`.

    Args:
        graph: the folded float graph.
        covariances: of the inputs of linears, by layer name (`input_covariances`); a layer without one is rounded to nearest.
        layer: a layer that has a weight.
        bits: the widths.
        symmetric: no zero points, at any width.
    """
    weight = tensor_of(graph.module, operand_nodes(graph.layer_node(layer))[1])
    qparams = [weight_ranges(weight, width, symmetric) for width in bits]
    if layer not in covariances:
        return [quantize_weight(weight, *pair, width) for pair, width in zip(qparams, bits, strict=True)]
    return compensated_widths(weight, covariances[layer], qparams, bits)


def input_covariances(graph: Graph, batches: Batches) -> dict[str, Tensor]:
    """The covariance of what each linear reads, float32 (I, I) by layer name, from one forward pass; layers that read one value share it.

    Covariance and not second moment: calibration gives every output channel its mean through the bias.
    """
    linears = {layer.name: graph.layer_node(layer.name) for layer in graph.layers if layer.op == "linear"}
    first: dict[str, str] = {}
    for name, node in linears.items():
        first.setdefault(operand_nodes(node)[0].name, name)
    counts, totals, squares = dict.fromkeys(linears, 0), {}, {}

    def watch(name: str) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            rows = arguments[0].reshape(-1, arguments[0].shape[-1])
            step = max(len(rows) // _ROWS, 1)
            while step > 1 and gcd(step, len(rows)) > 1:  # no common factor: it does not fall in step with the tokens
                step += 1
            rows = rows[::step].float()
            counts[name] += len(rows)
            totals[name] = totals.get(name, 0) + rows.sum(0)
            squares[name] = squares.get(name, 0) + rows.T @ rows
            return compute(*arguments)

        return intercept

    intercepts = {graph.nodes[name]: watch(name) for name in first.values()}
    with torch.no_grad():
        for images, _ in batches:
            run(graph.module, images, intercepts)
    found = {}
    for name in first.values():
        mean = totals[name] / max(counts[name], 1)
        found[name] = squares[name] / max(counts[name], 1) - torch.outer(mean, mean)
    return {name: found[first[operand_nodes(node)[0].name]] for name, node in linears.items()}
