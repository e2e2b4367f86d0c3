"""Rounds weights so that they make up for what quantizing has done to their inputs, front to back in one pass over the images.

The float and the quantized network advance block by block, side by side. A linear that reads x^ where the float one reads x gets the
float weights W' whose W' x^ is nearest to W x (fitting/ridge.py), and these are rounded so that later columns make up for earlier ones'
errors (fitting/compensation.py) in x, which served better than x^ (docs/log.md). As in matching.py, each output channel gets the float
network's mean and spread. What is behind it reads what all that makes, so that no error is made up for twice.

Nothing but sums is kept: a linear is fitted after 1, 2, 4, 8 ... batches to all that it has read so far, and to everything in the end.
From ERQ (Zhong et al., ICML 2024). Differs from the paper: streamed; GPTQ's rounding; the ridge falls with the tokens; mean and spread.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import Node

from vitq.affine import QuantizedWeight
from vitq.artifacts import Layer
from vitq.calibration.blocks import Progress
from vitq.calibration.channelwise import quantized_inputs
from vitq.calibration.ticks import tick
from vitq.fitting import fit_weights
from vitq.fitting.compensation import compensated
from vitq.fitting.inputs import InputPairs, some_rows
from vitq.fitting.ridge import absorbed
from vitq.graph import Graph, advance, start, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.moments import Moments, correction, gather
from vitq.quantizers import Quantizer
from vitq.ranges import Batches, weight_ranges

RIDGE = 100.0
"""How strongly W' is drawn towards W: by the square of `RIDGE` inputs / tokens, in units of the inputs' mean square.

Few tokens say little of many inputs, and what reads them, calibrated on the same images, takes their chance for a rule. With 64 of the
demo's images and fewer nothing is moved to speak of; moved as far as 256 allow, these made a 3-bit network's KL up to 12 % worse.
"""

_FEWEST_BITS = 3  # of an activation that weights are drawn for; for 2 it made the KL 7 % higher


def absorb(
    graph: Graph,
    activations: Mapping[str, Quantizer],
    bits: Mapping[str, int],
    batches: Batches,
    symmetric: bool = False,
    progress: Progress | None = None,
) -> dict[str, QuantizedWeight]:
    """The quantized weights, by layer name; a convolution's are rounded to nearest.

    Args:
        graph: the folded float graph.
        activations: their quantizers by `Operand.tensor`.
        bits: of each weight, by layer name.
        batches: the calibration images; gone through once, each batch by the float and by the quantized network.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer, each time that weights are fitted.
    """
    linears = [layer for layer in graph.layers if layer.op == "linear"]
    weights = {name: fit_weights(graph, {}, name, [width], symmetric)[0] for name, width in bits.items()}
    reads = {layer.name: operand_nodes(graph.layer_node(layer.name))[0] for layer in linears}  # not the tensor: patches are made of it
    first_reader = {node: name for name, node in reversed(reads.items())}
    pairs = {node: InputPairs() for node in first_reader}
    wanted: dict[str, Moments] = {}
    read_in_float: dict[Node, Tensor] = {}

    def fit(layer: Layer) -> None:
        read, width = pairs[reads[layer.name]], bits[layer.name]
        weight = tensor_of(graph.module, operand_nodes(graph.layer_node(layer.name))[1])
        if activations[layer.activations[0].tensor].bits >= _FEWEST_BITS:
            weight = absorbed(weight, read.covariance, read.missing, (RIDGE * weight.shape[1] / read.count) ** 2)
        rounded = compensated(weight, read.float_covariance, *weight_ranges(weight, width, symmetric), width)
        gain, _ = correction(wanted[layer.name], read.output(rounded.dequantize()))
        weights[layer.name] = replace(rounded, scale=rounded.scale * gain.float())
        told()

    def in_float(layer: Layer, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        output = compute(*arguments)
        gather(wanted, layer, output)
        if first_reader[reads[layer.name]] == layer.name:
            read_in_float[reads[layer.name]] = arguments[0]
        return output

    def quantized(layer: Layer, fitting: bool, compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        read = quantized_inputs(layer, activations, arguments)
        if not layer.has_weight:
            return compute(*read)
        if layer.op != "linear":
            return compute(*read, weights[layer.name].dequantize(), *arguments[2:])
        node = reads[layer.name]
        if first_reader[node] == layer.name:
            pairs[node].add(some_rows(read_in_float.pop(node)), some_rows(read[0]))
        if fitting:
            fit(layer)
        weight = weights[layer.name].dequantize()
        bias = wanted[layer.name].mean - pairs[node].output(weight).mean
        return compute(*read, weight, bias.float(), *arguments[3:])

    before = {graph.nodes[layer.name]: partial(in_float, layer) for layer in linears}
    count = 0
    for images, _ in batches:
        count += 1
        fitting = count & (count - 1) == 0
        told = tick(progress, len(linears), "weights")
        after = {graph.nodes[layer.name]: partial(quantized, layer, fitting) for layer in graph.layers}
        values = quantized_values = start(graph.module, images)
        for first, stop in graph.stretches:
            values = advance(graph.module, values, first, stop, before)
            quantized_values = advance(graph.module, quantized_values, first, stop, after)
    if count and not fitting:
        told = tick(progress, len(linears), "weights")
        for layer in linears:
            fit(layer)
    return weights
