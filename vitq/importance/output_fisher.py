"""The default metric: the predicted KL divergence of each layer at each width, from one forward and one backward pass.

For image n, layer l and width b, with g the probe's gradient at the layer's output (gradients.py) and d the change of that output when
the layer's operands are quantized as `calibrate` would quantize them,

    u_{n,l,b} = sum_i g_{n,l,i} d_{n,l,b,i}            cost(l, b) = 1/2 mean_n u_{n,l,b}^2            [nats per image]

which is the second-order expansion of KL(float || quantized). The product runs over the image's whole output before it is squared:
errors that cancel in the output cost nothing, which a diagonal Fisher misses. No op is run again: with d = X dW^T + dX W^T + dX dW^T,

    <g, dX W^T> = <g W, dX>        <g, X dW^T> = <g^T X, dW>        <g, dX dW^T> = <g^T dX, dW>

so one image's weight gradient prices all widths of the weight, its input gradient all widths of the input, and one product a width
(where the input's error is not negligible) all pairs. Calibration restores the mean and the spread of every channel
(calibration/moments.py); so the mean of d is taken out, and d becomes gain y^ - y, with one gain for all channels of the layer, from a
sample of its rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from vitq.affine import QParams, quantize_dequantize, quantize_weight
from vitq.artifacts import WIDTHS, Bits, CostTable, Layer
from vitq.gradients import LayerTrace, Probe, trace
from vitq.graph import Graph, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.ranges import Batches, Histogram, activation_qparams, weight_ranges

_NEGLIGIBLE = 0.02
"""An input whose error has less than this share of its power (4 bits and more, mostly) adds nothing to a cost by its product with dW."""

_GAIN_ROWS = 128
"""Rows (image times token) of a batch from which a gain is estimated: both spreads are of the same rows, so few are enough."""


def output_fisher(
    graph: Graph, histograms: Mapping[str, Histogram], batches: Batches, bits: Sequence[int], probe: Probe, seed: int = 0
) -> CostTable:
    """Prices every layer at every width.

    Args:
        graph: the folded graph (`ranges.fold`), whose layers and values are those that calibration starts from.
        histograms: of every activation, by `Operand.tensor`.
        batches: the images; gone through once.
        bits: the widths, ascending.
        probe: the loss's probe.
        seed: of the probe's signs.

    Returns:
        Costs in nats per image (for backbones: half the squared relative error), never increasing with the width.
    """
    generator = torch.Generator().manual_seed(seed)
    qparams = {tensor: [activation_qparams(histogram, width) for width in bits] for tensor, histogram in histograms.items()}
    weight_changes = {layer.name: _weight_changes(graph, layer, bits) for layer in graph.layers if layer.has_weight}
    sums = {layer.name: np.zeros((len(bits) + 1, len(bits) + 1)) for layer in graph.layers}
    count = 0
    for images, _ in batches:
        count += len(images)
        for traced in trace(graph, images, probe, generator):
            changes = [[_change(x, p) for p in qparams[operand.tensor]] for operand, x in _operands(traced)]
            if traced.layer.has_weight:
                u = _weighted(traced, changes[0], weight_changes[traced.layer.name], len(images))
            else:
                u = _matmul(traced, changes, len(images))
            sums[traced.layer.name] += 0.5 * u.double().square().sum(0).numpy()
    return _table(graph, {name: total / count for name, total in sums.items()}, bits)


def _operands(traced: LayerTrace):
    return zip(traced.layer.activations, traced.inputs, strict=True)


def _change(x: Tensor, qparams: QParams) -> Tensor:
    return quantize_dequantize(x, qparams.scale, qparams.zero_point, qparams.bits) - x


def _weight_changes(graph: Graph, layer: Layer, bits: Sequence[int]) -> list[Tensor]:
    """W^ - W at each width, of the weight's shape."""
    weight = tensor_of(graph.module, operand_nodes(graph.layer_node(layer.name))[1])
    return [quantize_weight(weight, *weight_ranges(weight, width), width).dequantize() - weight for width in bits]


def _weighted(traced: LayerTrace, dx: list[Tensor], dw: list[Tensor], images: int) -> Tensor:
    """The u of a linear or convolution at every pair of widths: (images, 1 + widths of the weight, 1 + widths of the input).

    Index 0 on an axis means that this operand is not quantized.
    """
    x, g, weight = traced.inputs[0], traced.gradient, traced.weight
    assert weight is not None
    if traced.layer.op == "linear":
        g_rows, x_rows = _rows(g, images), _rows(x, images)  # (images, tokens, O), (images, tokens, I)
        return _linear_products(g_rows, x_rows, [_rows(change, images) for change in dx], weight, dw)
    return _convolution_products(traced, dx, weight, dw, images)


def _linear_products(g: Tensor, x: Tensor, dx: list[Tensor], weight: Tensor, dw: list[Tensor]) -> Tensor:
    x, dx = _centered(x, (0, 1)), [_centered(change, (0, 1)) for change in dx]  # then d has mean 0: the bias takes up the rest
    stacked = torch.stack([change.flatten() for change in dw])  # (widths, O I)
    input_gradient = g @ weight  # (images, tokens, I)
    y = (input_gradient * x).flatten(1).sum(1)  # <g, X W^T>, (images,)
    d = x.new_zeros(len(x), len(dw) + 1, len(dx) + 1)
    d[:, 1:, 0] = (g.mT @ x).flatten(1) @ stacked.T
    for index, change in enumerate(dx, start=1):
        d[:, 0, index] = (input_gradient * change).flatten(1).sum(1)
        d[:, 1:, index] = d[:, 1:, 0] + d[:, 0, index, None]
        if change.square().sum() > _NEGLIGIBLE * x.square().sum():
            d[:, 1:, index] += (g.mT @ change).flatten(1) @ stacked.T  # <g, dX dW^T>, (images, widths)
    gain = _gains(x, dx, weight, dw)
    return gain * d + (gain - 1) * y[:, None, None]


def _gains(x: Tensor, dx: list[Tensor], weight: Tensor, dw: list[Tensor]) -> Tensor:
    """What calibration multiplies the output by to restore its spread: (1 + widths of the weight, 1 + widths of the input).

    One number for all channels, from some of the rows; the two operands' gains multiply.
    """
    rows = slice(None, None, max(1, x.shape[0] * x.shape[1] // _GAIN_ROWS))
    x, dx = x.flatten(0, 1)[rows], [change.flatten(0, 1)[rows] for change in dx]
    spread = (x @ weight.T).square().sum()
    of_weight = [spread / (x @ (weight + change).T).square().sum().clamp(min=1e-12) for change in dw]
    of_input = [spread / ((x + change) @ weight.T).square().sum().clamp(min=1e-12) for change in dx]
    one = torch.ones_like(spread)
    gains = torch.outer(torch.stack([one, *of_weight]), torch.stack([one, *of_input])).sqrt()
    return gains.clamp(0.5, 2.0)


def _convolution_products(traced: LayerTrace, dx: list[Tensor], weight: Tensor, dw: list[Tensor], images: int) -> Tensor:
    x, g, compute = traced.inputs[0], traced.gradient, traced.compute

    def product(changed_x: Tensor, changed_w: Tensor) -> Tensor:
        d = _centered(compute(changed_x, changed_w), (0, *range(2, g.dim())))
        return (g * d).reshape(images, -1).sum(1)

    u = x.new_zeros(images, len(dw) + 1, len(dx) + 1)
    for row, w_change in enumerate(dw, start=1):
        u[:, row, 0] = product(x, w_change)
    for column, x_change in enumerate(dx, start=1):
        u[:, 0, column] = product(x_change, weight)
        # The product of both errors is run for equal widths only, and taken for the pairs around it; it is of second order.
        u[:, 1:, column] = u[:, 1:, 0] + u[:, 0, column, None] + product(x_change, dw[column - 1])[:, None]
    return u


def _matmul(traced: LayerTrace, changes: list[list[Tensor]], images: int) -> Tensor:
    """The u of a matmul whose two inputs have one width: (images, 1 + widths, 1 + widths), on the diagonal."""
    left, right = traced.inputs
    g = traced.gradient
    left_gradient, right_gradient = g @ right.mT, left.mT @ g
    widths = len(changes[0])
    u = g.new_zeros(images, widths + 1, widths + 1)
    for index, (dl, dr) in enumerate(zip(*changes, strict=True), start=1):
        first = (left_gradient * dl).reshape(images, -1).sum(1) + (right_gradient * dr).reshape(images, -1).sum(1)
        u[:, index, index] = first + (g * (dl @ dr)).reshape(images, -1).sum(1)
    return u


def _centered(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x - x.mean(axes, keepdim=True)


def _rows(x: Tensor, images: int) -> Tensor:
    """(images, everything between, channels)."""
    return x.reshape(images, -1, x.shape[-1])


def _table(graph: Graph, costs: Mapping[str, np.ndarray], bits: Sequence[int]) -> CostTable:
    tied, weight, activation, cross = {}, {}, {}, {}
    for layer in graph.layers:
        cost = costs[layer.name]
        tied[layer.name] = _falling(np.diagonal(cost)[1:])
        if layer.has_weight:
            weight[layer.name] = _falling(cost[1:, 0])
            activation[layer.name] = _falling(cost[0, 1:])
            separate = np.add.outer(weight[layer.name], activation[layer.name])
            cross[layer.name] = tuple(tuple(float(value) for value in row) for row in cost[1:, 1:] - separate)
        else:
            activation[layer.name] = tied[layer.name]
    widths: tuple[Bits, ...] = tuple(width for width in WIDTHS if bits.count(width))
    return CostTable(unit="nats", bits=widths, tied=tied, weight=weight, activation=activation, cross=cross)


def _falling(costs: np.ndarray) -> tuple[float, ...]:
    """The closest costs that never rise with the width."""
    fitted = isotonic_regression(np.maximum(costs, 0.0), increasing=False).x
    return tuple(float(value) for value in fitted)
