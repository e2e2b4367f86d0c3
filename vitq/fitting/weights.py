"""The codes that weights get: least-squares ranges for each output channel, and rounding that knows what the layer reads.

A linear whose inputs' covariance is known is rounded with compensation (compensation.py); a convolution, or one without, to nearest.
The covariance is that of the float network's inputs, one for all widths and plans: what metrics price. Calibration, which knows the plan,
draws the weights to where they make up for their quantized inputs before it rounds them so (calibration/absorbing.py).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, quantize_weight
from vitq.fitting.compensation import compensated_widths
from vitq.fitting.inputs import some_rows
from vitq.graph import Graph, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.graph.run import Intercept
from vitq.ranges import Batches, go_through, weight_ranges


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
    sums, intercepts = watch_inputs(graph)
    go_through(graph, batches, intercepts)
    return {name: found.covariance for name, found in sums.items()}


class InputSums:
    """Count, sum and products of the rows that a linear reads, less the first batch's mean: float32 would lose what a large one leaves."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._count, self._total, self._products = 0, torch.zeros(inputs, device=device), torch.zeros(inputs, inputs, device=device)
        self._about: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Takes in one batch, (..., I)."""
        rows = some_rows(x)
        self._about = rows.mean(0) if self._about is None else self._about
        rows = rows - self._about
        self._count += len(rows)
        self._total += rows.sum(0)
        self._products += rows.T @ rows

    @property
    def covariance(self) -> Tensor:
        """Float32 (I, I)."""
        count = max(self._count, 1)
        return self._products / count - torch.outer(self._total, self._total) / count**2


def watch_inputs(graph: Graph) -> tuple[dict[str, InputSums], dict[str, Intercept]]:
    """Sums of what each linear reads, by layer name, that fill while the graph runs with the intercepts, by node name."""
    sums: dict[str, InputSums] = {}
    of_value: dict[str, InputSums] = {}
    intercepts: dict[str, Intercept] = {}
    for layer in graph.layers:
        if layer.op == "linear":
            value = operand_nodes(graph.layer_node(layer.name))[0]
            if value.name not in of_value:
                of_value[value.name] = InputSums(layer.operands[1].shape[1], value.meta["val"].device)
                intercepts[graph.nodes[layer.name]] = partial(_taken_in, of_value[value.name])
            sums[layer.name] = of_value[value.name]
    return sums, intercepts


def _taken_in(sums: InputSums, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    sums.add(arguments[0])
    return compute(*arguments)
