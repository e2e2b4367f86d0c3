"""The default metric: the predicted KL divergence of each layer at each width, from one forward and two backward passes.

For image n, layer l and width b, with g a probe's gradient at the layer's output (gradients.py; each image has a pair) and d the change
of that output when the layer's operands are quantized as `calibrate` would quantize them,

    u_{n,l,b} = sum_i g_{n,l,i} d_{n,l,b,i}            cost(l, b) = 1/2 mean_n u_{n,l,b}^2            [nats per image]

which is the second-order expansion of KL(float || quantized). The product runs over the image's whole output before it is squared:
errors that cancel in the output cost nothing, which a diagonal Fisher misses. No op is run again: with X^ = X + dX, W^ = W + dW,

    <g, X^ W^^T - X W^T> = <g W, X^> - <g W, X> + <g^T X^, dW>

so one image's input gradient, which the backward pass has anyway, prices all widths of the input, its weight gradient all widths of the
weight, and one product a width (where the input's error is not negligible) all pairs.

Calibration restores the mean and the spread of every channel (calibration/matching.py). So the mean over the batch is taken out of X and
X^, and with y the layer's output, y^ the quantized one and one gain for all its channels, d = gain y^ - y: u is linear in the gain, so
that its second moments are summed first and the gain is put in at the end.

A plan that is chosen by these costs gathers layers that chance has made look cheap. So the images' two halves, every other image, are
priced apart too: what one half's plan costs by the other's prices is what the chosen plan can be expected to cost (allocation).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vitq.affine import quantize_dequantize
from vitq.artifacts import WIDTHS, Bits, CostTable, Layer
from vitq.fitting import fit_operand, fit_weights, relative_error, roles
from vitq.gradients import LayerTrace, trace
from vitq.graph import Graph, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.importance.costs import falling
from vitq.importance.pairs import PairMoments
from vitq.importance.subject import Subject
from vitq.quantizers import IntegerQuantizer, Uniform

_NEGLIGIBLE = 0.05
"""An input whose error has less than this share of its power (4 bits and more, mostly) adds nothing to a cost by its product with
another operand's error."""

_IMAGES_AT_ONCE = 8  # whose weight gradients are held together

_TOKENS_APART = 0.618  # rows that the gains are taken from: one after this part of an image, so that they fall on all of its tokens
_FEWEST_ROWS = 64  # of a batch, where it has them


def output_fisher(subject: Subject) -> CostTable:
    """Prices every layer at every width.

    Returns:
        Costs in nats per image (for backbones: half the squared relative error), never increasing with the width.
    """
    graph, pricing = subject.graph, _Pricing.of(subject)
    moments = {layer.name: _Moments.zeros(len(subject.bits)) for layer in graph.layers}
    together = PairMoments(graph, len(subject.bits)) if subject.options.pairs else None
    generator = torch.Generator().manual_seed(subject.seed)
    counts, visited = np.zeros(2, dtype=int), 0  # counts: images, once for each of the two probes
    for images, _ in subject.batches:

        def price(traced: LayerTrace, count: int = len(images)) -> None:
            nonlocal visited
            subject.progress((int(counts.sum()) + count * visited / len(graph.layers)) / 2)
            visited += 1
            with torch.no_grad():
                products = pricing.products(traced, count)
            moments[traced.layer.name].add(products)
            if together is not None:
                together.add(traced.layer.name, products.errors.diagonal(dim1=1, dim2=2)[:, 1:], products.output)

        def end(count: int = len(images)) -> None:
            nonlocal visited
            visited = 0
            if together is not None:
                together.end_batch()
            counts[:] += [-(-count // 2), count // 2]

        trace(graph, images, subject.pair, generator, price, end)
    totals = {name: found.costs() for name, found in moments.items()}
    table = _table(graph, {name: total.sum(0) / max(counts.sum(), 1) for name, total in totals.items()}, subject.bits)
    if counts.min() > 0:
        halves = [_table(graph, {name: total[half] / counts[half] for name, total in totals.items()}, subject.bits) for half in (0, 1)]
        table = table.model_copy(update={"halves": tuple(halves)})
    if together is None:
        return table
    gains = {name: found.gain().diagonal()[1:] for name, found in moments.items()}
    return table.model_copy(update={"pairs": together.costs(gains, max(counts.sum(), 1))})


@dataclass(frozen=True)
class _Products:
    """Of one batch and layer, at every pair of widths; index 0 on an axis means that this operand is not quantized.

    `errors` (images, 1 + widths of the weight, 1 + widths of the input) are <g, y^ - y>, `output` (images,) is <g, y>, and `spread`
    (same shape as one image's errors) the squared norm of y^ on some rows, None for a layer without gains.
    """

    errors: Tensor
    output: Tensor
    spread: Tensor | None


@dataclass
class _Moments:
    """Sums over each half of the images (the first axis) of the products' second moments, of which a layer's costs are made."""

    error_error: np.ndarray
    error_output: np.ndarray
    output_output: np.ndarray
    spread: np.ndarray | None

    @classmethod
    def zeros(cls, widths: int) -> "_Moments":
        square = np.zeros((2, widths + 1, widths + 1))
        return cls(square, square.copy(), np.zeros((2, 1, 1)), None)

    def add(self, products: _Products) -> None:
        for half in (0, 1):
            errors, output = products.errors[half::2].double(), products.output[half::2].double()
            self.error_error[half] += errors.square().sum(0).numpy(force=True)
            self.error_output[half] += (errors * output[:, None, None]).sum(0).numpy(force=True)
            self.output_output[half] += float(output.square().sum())
        if products.spread is not None:
            self.spread = products.spread.double().numpy(force=True) + (0.0 if self.spread is None else self.spread)

    def costs(self) -> np.ndarray:
        """Sum over each half of the images of 1/2 u^2, u = gain <g, y^ - y> + (gain - 1) <g, y>, (2, widths + 1, widths + 1)."""
        gain = self.gain()
        return 0.5 * (gain**2 * self.error_error + 2 * gain * (gain - 1) * self.error_output + (gain - 1) ** 2 * self.output_output)

    def gain(self) -> np.ndarray:
        """What calibration multiplies the output by to restore its spread; of a pair, the product of both operands' own gains."""
        if self.spread is None:
            return np.ones_like(self.error_error[0])
        alone = self.spread[0, 0] / np.maximum(self.spread, 1e-12)
        return np.sqrt(np.outer(alone[:, 0], alone[0])).clip(0.5, 2.0)


@dataclass(frozen=True)
class _Pricing:
    """The quantizers of every width and what they do to a batch; `negligible` says whose errors have no part in products of two."""

    quantizers: Mapping[str, Sequence[IntegerQuantizer]]
    negligible: Mapping[str, Sequence[bool]]
    weight_changes: Mapping[str, Tensor]

    @classmethod
    def of(cls, subject: Subject) -> "_Pricing":
        """Fits the quantizers of a subject."""
        found, role = subject.histograms, roles(subject.graph.layers)
        quantizers = {tensor: [fit_operand(held, width, role[tensor]) for width in subject.bits] for tensor, held in found.items()}
        weighted = [layer for layer in subject.graph.layers if layer.has_weight]
        return cls(
            quantizers,
            {tensor: [relative_error(found[tensor], q) < _NEGLIGIBLE for q in fitted] for tensor, fitted in quantizers.items()},
            {layer.name: _weight_changes(subject, layer) for layer in weighted},
        )

    def products(self, traced: LayerTrace, images: int) -> _Products:
        """The products of one layer over a batch of so many images."""
        if traced.layer.op == "linear":
            return self._linear(traced, images)
        return self._convolution(traced, images) if traced.layer.has_weight else self._matmul(traced, images)

    def _linear(self, traced: LayerTrace, images: int) -> _Products:
        weight, dw = traced.weight, self.weight_changes[traced.layer.name]
        assert weight is not None
        x, input_gradient, g = (_rows(t, images) for t in (traced.inputs[0], traced.input_gradients[0], traced.gradient))
        g_total, input_total, stacked = g.sum(1), input_gradient.sum(1), dw.flatten(1)
        read, scratch = torch.empty_like(x), torch.empty_like(x)

        def through_weight(value: Tensor, mean: Tensor) -> Tensor:
            """<g W, value - mean>, (images,)."""
            return _dot(input_gradient, value, images, scratch) - input_total @ mean

        def through_change(value: Tensor, mean: Tensor) -> Tensor:
            """<g, (value - mean) dW^T> at each width of the weight, (images, widths)."""
            some = zip(g.split(_IMAGES_AT_ONCE), value.split(_IMAGES_AT_ONCE), strict=True)
            return torch.cat([(g.mT @ value).flatten(1) @ stacked.T for g, value in some]) - g_total @ (dw @ mean).T

        mean = x.mean((0, 1))
        output, from_weight = through_weight(x, mean), through_change(x, mean)
        tensor = traced.layer.operands[0].tensor
        errors = x.new_zeros(images, len(dw) + 1, len(dw) + 1)
        errors[:, 1:, 0] = from_weight
        some = slice(None, None, max(1, min(round(_TOKENS_APART * x.shape[1]), len(x) * x.shape[1] // _FEWEST_ROWS)))
        sampled = [x.flatten(0, 1)[some] - mean]
        for column, (quantizer, negligible) in enumerate(zip(self.quantizers[tensor], self.negligible[tensor], strict=True), start=1):
            _quantize(x, quantizer, read)
            mean = read.mean((0, 1))
            errors[:, 0, column] = through_weight(read, mean) - output
            errors[:, 1:, column] = errors[:, 0, column, None] + (from_weight if negligible else through_change(read, mean))
            sampled.append(read.flatten(0, 1)[some] - mean)
        return _Products(errors, output, _spread(sampled, weight, dw))

    def _convolution(self, traced: LayerTrace, images: int) -> _Products:
        x, g, compute, weight = traced.inputs[0], traced.gradient, traced.compute, traced.weight
        assert weight is not None

        def product(changed_x: Tensor, changed_weight: Tensor) -> Tensor:
            d = compute(changed_x, changed_weight)
            return _dot(g, d - d.mean((0, *range(2, d.dim())), keepdim=True), images)

        dw = self.weight_changes[traced.layer.name]
        errors = x.new_zeros(images, len(dw) + 1, len(dw) + 1)
        for row, change in enumerate(dw, start=1):
            errors[:, row, 0] = product(x, change)
        for column, quantizer in enumerate(self.quantizers[traced.layer.operands[0].tensor], start=1):
            dx = _quantize(x, quantizer, torch.empty_like(x)).sub_(x)
            errors[:, 0, column] = product(dx, weight)
            # The product of both errors is run for equal widths only, and taken for the pairs around it; it is of second order.
            errors[:, 1:, column] = errors[:, 1:, 0] + (errors[:, 0, column] + product(dx, dw[column - 1]))[:, None]
        return _Products(errors, x.new_zeros(images), None)

    def _matmul(self, traced: LayerTrace, images: int) -> _Products:
        """Of a matmul, whose two inputs have one width, on the diagonal."""
        (left, right), (left_gradient, right_gradient) = traced.inputs, traced.input_gradients
        one, other = (operand.tensor for operand in traced.layer.operands)
        widths = len(self.quantizers[one])
        errors = left.new_zeros(images, widths + 1, widths + 1)
        read_left, read_right, scratch = torch.empty_like(left), torch.empty_like(right), torch.empty_like(left)

        def first_order(changed_left: Tensor, changed_right: Tensor) -> Tensor:
            return _dot(left_gradient, changed_left, images, scratch) + _dot(right_gradient, changed_right, images, scratch)

        whole = first_order(left, right)
        for index in range(widths):
            _quantize(left, self.quantizers[one][index], read_left)
            _quantize(right, self.quantizers[other][index], read_right)
            error = first_order(read_left, read_right) - whole
            if not (self.negligible[one][index] or self.negligible[other][index]):
                error += _dot(traced.gradient, read_left.sub_(left) @ read_right.sub_(right), images)
            errors[:, index + 1, index + 1] = error
        return _Products(errors, left.new_zeros(images), None)


def _quantize(x: Tensor, quantizer: IntegerQuantizer, out: Tensor) -> Tensor:
    """X as a layer reads it, into `out`: equal steps need no other memory."""
    if isinstance(quantizer, Uniform):
        return quantize_dequantize(x, quantizer.scale, quantizer.zero_point, quantizer.bits, out=out)
    return out.copy_(quantizer.quantize_dequantize(x))


def _weight_changes(subject: Subject, layer: Layer) -> Tensor:
    """W^ - W at each width, (widths, *weight's shape)."""
    weight = tensor_of(subject.graph.module, operand_nodes(subject.graph.layer_node(layer.name))[1])
    fitted = fit_weights(subject.graph, subject.covariances, layer.name, subject.bits)
    return torch.stack([quantized.dequantize() - weight for quantized in fitted])


def _spread(inputs: Sequence[Tensor], weight: Tensor, dw: Tensor) -> Tensor:
    """The squared norm of the output for the float input and each quantized one (rows, I), and for each weight; off the axes zero."""
    spread = weight.new_zeros(len(dw) + 1, len(inputs))
    spread[0] = torch.stack([(x @ weight.T).square().sum() for x in inputs])
    spread[1:, 0] = torch.stack([(inputs[0] @ (weight + change).T).square().sum() for change in dw])
    return spread


def _dot(a: Tensor, b: Tensor, images: int, scratch: Tensor | None = None) -> Tensor:
    """The inner product of each image's part, (images,); `scratch` takes the products where its shape fits, and saves fresh memory."""
    return torch.mul(a, b, out=scratch if scratch is not None and scratch.shape == a.shape else None).reshape(images, -1).sum(1)


def _rows(x: Tensor, images: int) -> Tensor:
    """(images, everything between, channels)."""
    return x.reshape(images, -1, x.shape[-1])


def _table(graph: Graph, costs: Mapping[str, np.ndarray], bits: Sequence[int]) -> CostTable:
    tied, weight, activation, cross = {}, {}, {}, {}
    for layer in graph.layers:
        cost = costs[layer.name]
        tied[layer.name] = falling(np.diagonal(cost)[1:])
        if layer.has_weight:
            weight[layer.name] = falling(cost[1:, 0])
            activation[layer.name] = falling(cost[0, 1:])
            separate = np.add.outer(weight[layer.name], activation[layer.name])
            cross[layer.name] = tuple(tuple(float(value) for value in row) for row in cost[1:, 1:] - separate)
        else:
            activation[layer.name] = tied[layer.name]
    widths: tuple[Bits, ...] = tuple(width for width in WIDTHS if bits.count(width))
    return CostTable(unit="nats", bits=widths, tied=tied, weight=weight, activation=activation, cross=cross)
