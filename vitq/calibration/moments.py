"""Gives every quantized layer's output channels the mean and the spread that the float network's have.

Quantizing shrinks a signal: a least-squares code is the mean of what it stands for, so the output loses the spread inside the codes,
nothing at 8 bits, a tenth and more of an operand at 2. Rounding errors of different layers add up as noise does; shrinking adds up
coherently, layer by layer along the residual stream. Per output channel o of y = W x + b, with y^ what the quantized layer makes of its
quantized inputs,

    gain_o = sd(y_o) / sd(y^_o)          bias_o = E[y_o] - gain_o E[y^_o]

The gain goes into the weight's scale, which every output channel has anyway, so it costs nothing in the file or at run time.
The mean alone is the usual bias correction (Nagel et al., ICCV 2019, section 4.2). Inputs come from the quantized network, whose earlier
layers are corrected already, in one pass over the images: corrections settle as the statistics grow, batch by batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QParams, QuantizedWeight, quantize_dequantize
from vitq.artifacts import Layer
from vitq.graph import Graph, run
from vitq.graph.run import Intercept
from vitq.ranges import Batches

_LARGEST_GAIN = 2.0  # what shrinks more has lost its signal; noise should not be blown up in its place


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of a layer's output, per channel: float64 (O,)."""

    count: int
    total: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of each channel."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """The variance of each channel."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


def match_moments(
    graph: Graph, activations: Mapping[str, QParams], weights: Mapping[str, QuantizedWeight], batches: Batches
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The weights with the gains in their scales, and the biases, by layer name.

    Args:
        graph: the folded float graph.
        activations: scale and zero point by `Operand.tensor`.
        weights: the quantized weights by layer name.
        batches: the calibration images; gone through once, each batch by the float and by the quantized network.

    Returns:
        The weights, and what each bias is to be, float32 (O,).
    """
    wanted: dict[str, Moments] = {}
    found: dict[str, Moments] = {}
    dequantized = {name: weight.dequantize() for name, weight in weights.items()}
    for images, _ in batches:
        with torch.no_grad():
            run(graph.module, images, {graph.nodes[layer.name]: _watch(layer, wanted) for layer in graph.layers if layer.has_weight})
            quantized = {graph.nodes[layer.name]: _correct(layer, activations, dequantized, wanted, found) for layer in graph.layers}
            run(graph.module, images, quantized)
    corrections = {name: _correction(wanted[name], found[name]) for name in found}
    scaled = {name: replace(weights[name], scale=weights[name].scale * gain.float()) for name, (gain, _) in corrections.items()}
    return {**weights, **scaled}, {name: bias.float() for name, (_, bias) in corrections.items()}


def _watch(layer: Layer, wanted: dict[str, Moments]) -> Intercept:
    def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        output = compute(*arguments)
        wanted[layer.name] = _add(wanted.get(layer.name), layer, output)
        return output

    return intercept


def _correct(
    layer: Layer,
    activations: Mapping[str, QParams],
    dequantized: Mapping[str, Tensor],
    wanted: Mapping[str, Moments],
    found: dict[str, Moments],
) -> Intercept:
    """Runs a layer quantized, without its bias, and gives its output the moments that are wanted so far."""
    qparams = [activations[operand.tensor] for operand in layer.activations]

    def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        read = [quantize_dequantize(x, p.scale, p.zero_point, p.bits) for x, p in zip(arguments, qparams, strict=False)]
        if not layer.has_weight:
            return compute(*read)
        output = compute(*read, dequantized[layer.name], None, *arguments[3:])
        found[layer.name] = _add(found.get(layer.name), layer, output)
        gain, bias = (_along_channels(layer, value.to(output), output) for value in _correction(wanted[layer.name], found[layer.name]))
        return output * gain + bias

    return intercept


def _correction(wanted: Moments, found: Moments) -> tuple[Tensor, Tensor]:
    """Gain and bias of the module's equations, float64 (O,); a channel that does not vary keeps its gain."""
    varies = (found.variance > 1e-12 * found.squares / found.count) & (wanted.variance > 0)
    gain = torch.where(varies, (wanted.variance / found.variance.clamp(min=1e-300)).sqrt(), 1.0).clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN)
    return gain, wanted.mean - gain * found.mean


def _add(moments: Moments | None, layer: Layer, output: Tensor) -> Moments:
    rows = output.movedim(_channel_axis(layer), -1).reshape(-1, layer.channels).double()
    new = Moments(len(rows), rows.sum(0), rows.square().sum(0))
    if moments is None:
        return new
    return Moments(moments.count + new.count, moments.total + new.total, moments.squares + new.squares)


def _along_channels(layer: Layer, values: Tensor, output: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (0 if layer.op == "linear" else output.dim() - 2))


def _channel_axis(layer: Layer) -> int:
    return -1 if layer.op == "linear" else 1
