"""Gives every quantized layer's output channels the mean and the spread that the float network's have (moments.py).

Quantizing shrinks a signal: a least-squares code is the mean of what it stands for, so the output loses the spread inside the codes,
nothing at 8 bits, a tenth and more of an operand at 2. Rounding errors of different layers add up as noise does; shrinking adds up
coherently, layer by layer along the residual stream. The gain goes into the weight's scale, which every output channel has anyway, so it
costs nothing in the file or at run time.

Both networks advance block by block, side by side, each from the values that it left at the block's start. The quantized network's
earlier layers are thus corrected already, in one pass over the images: corrections settle as the statistics grow, batch by batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight
from vitq.artifacts import Layer
from vitq.graph import Graph, advance, start
from vitq.graph.run import Intercept
from vitq.moments import Moments, corrected, correction, gather
from vitq.quantizers import Quantizer
from vitq.ranges import Batches


def match_moments(
    graph: Graph, activations: Mapping[str, Quantizer], weights: Mapping[str, QuantizedWeight], batches: Batches
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """The weights with the gains in their scales, and the biases, by layer name.

    Args:
        graph: the folded float graph.
        activations: their quantizers by `Operand.tensor`.
        weights: the quantized weights by layer name.
        batches: the calibration images; gone through once, each batch by the float and by the quantized network.

    Returns:
        The weights, and what each bias is to be, float32 (O,).
    """
    wanted: dict[str, Moments] = {}
    found: dict[str, Moments] = {}
    dequantized = {name: weight.dequantize() for name, weight in weights.items()}
    watched = {graph.nodes[layer.name]: _watch(layer, wanted) for layer in graph.layers if layer.has_weight}
    quantized = {graph.nodes[layer.name]: _correct(layer, activations, dequantized, wanted, found) for layer in graph.layers}
    with torch.no_grad():
        for images, _ in batches:
            in_float = in_quantized = start(graph.module, images)
            for first, stop in graph.stretches:
                in_float = advance(graph.module, in_float, first, stop, watched)
                in_quantized = advance(graph.module, in_quantized, first, stop, quantized)
    corrections = {name: correction(wanted[name], found[name]) for name in found}
    scaled = {name: replace(weights[name], scale=weights[name].scale * gain.float()) for name, (gain, _) in corrections.items()}
    return {**weights, **scaled}, {name: bias.float() for name, (_, bias) in corrections.items()}


def _watch(layer: Layer, wanted: dict[str, Moments]) -> Intercept:
    def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        output = compute(*arguments)
        gather(wanted, layer, output)
        return output

    return intercept


def _correct(
    layer: Layer,
    activations: Mapping[str, Quantizer],
    dequantized: Mapping[str, Tensor],
    wanted: Mapping[str, Moments],
    found: dict[str, Moments],
) -> Intercept:
    """Runs a layer quantized, without its bias, and gives its output the moments that are wanted so far."""
    quantizers = [activations[operand.tensor] for operand in layer.activations]

    def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        read = [quantizer.quantize_dequantize(x) for x, quantizer in zip(arguments, quantizers, strict=False)]
        if not layer.has_weight:
            return compute(*read)
        output = compute(*read, dequantized[layer.name], None, *arguments[3:])
        return corrected(layer, output, *correction(wanted[layer.name], gather(found, layer, output)))

    return intercept
