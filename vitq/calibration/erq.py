"""Recipe `erq`: weights that make up for quantized inputs and for each other's rounding (ERQ, Zhong et al., ICML 2024).

LayerNorms and activations are those of recipe `repq-vit`, from the paper before. Then the float and the quantized network advance side by
side, and each linear that reads x^ where the float one reads x gets, by ridge regression of W x + b on x^, float weights W' and a bias
that give what W x + b was (fitting/ridge.py); W' is rounded half by half, the half that is still float making up for the one that was
rounded, and the rounding of each half refined row by row by the proxy e (mu mu^T + Sigma) e^T (fitting/halves.py).

Differs from the paper: lambda is in units of the inputs' mean square, and one for all layers; the ridge does not draw the bias; x^ is what
the quantized network reads, where the authors' code quantizes the x of the float one. Weights lie between repq-vit's quantiles, where the
authors' code tries closer ones too and gives some input channels of qkv and fc1 a range of their own. See also repq_vit.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, quantize_weight
from vitq.artifacts import BitPlan, Layer
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.channelwise import fold_channelwise, quantized_inputs
from vitq.calibration.ticks import tick
from vitq.checkpoint import Checkpoint
from vitq.fitting.halves import halved
from vitq.fitting.inputs import InputPairs
from vitq.fitting.percentile import percentile_weights
from vitq.fitting.ridge import absorbed
from vitq.graph import Graph, advance, start
from vitq.graph.run import Intercept
from vitq.ranges import Batches

RIDGE = 4.0
"""Lambda of both regressions, in units of the inputs' mean square."""


def calibrate_erq(
    graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False, ridge: float = RIDGE, progress: Progress | None = None
) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images, 32 in the paper; held in memory.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.
        ridge: lambda of both regressions, in units of the inputs' mean square.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    folded, activations = fold_channelwise(graph, plan, batches, progress=progress)
    weights: dict[str, QuantizedWeight] = {}
    biases: dict[str, Tensor] = {}
    read_in_float: dict[str, Tensor] = {}
    told = tick(progress, len(folded.layers), "weights")

    def keep(layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            read_in_float[layer.name] = arguments[0]
            return compute(*arguments)

        return intercept

    def at_layer(layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            told()
            read = quantized_inputs(layer, activations, arguments)
            if not layer.has_weight:
                return compute(*read, *arguments[len(read) :])
            weight, bias, bits = arguments[1], arguments[2], plan.bits[layer.name].weight_bits
            assert bits is not None
            if layer.op == "linear":
                pairs = InputPairs()
                pairs.add(*(x.flatten(0, -2).double() for x in (read_in_float.pop(layer.name), read[0])))
                weights[layer.name], biases[layer.name] = compensated_layer(weight, bias, pairs, bits, ridge, symmetric)
            else:
                weights[layer.name] = quantize_weight(weight, *percentile_weights(weight, bits, symmetric), bits)
            return compute(*read, weights[layer.name].dequantize(), biases.get(layer.name, bias), *arguments[3:])

        return intercept

    kept = {folded.nodes[layer.name]: keep(layer) for layer in folded.layers if layer.op == "linear"}
    quantized = {folded.nodes[layer.name]: at_layer(layer) for layer in folded.layers}
    with torch.no_grad():
        in_float = in_quantized = start(folded.module, torch.cat([images for images, _ in batches]))
        for first, stop in folded.stretches:
            in_float = advance(folded.module, in_float, first, stop, kept)
            in_quantized = advance(folded.module, in_quantized, first, stop, quantized)
    return assemble(folded, plan, weights, activations, biases)


def compensated_layer(
    weight: Tensor, bias: Tensor, pairs: InputPairs, bits: int, ridge: float, symmetric: bool = False
) -> tuple[QuantizedWeight, Tensor]:
    """The codes of a linear's weight (O, I) and its bias (O,) for inputs of these moments, float64."""
    absorbing = absorbed(weight, pairs.covariance, pairs.missing, ridge)
    moved = bias.double() + weight.double() @ pairs.mean - absorbing.double() @ pairs.quantized_mean
    second_moment = torch.outer(pairs.quantized_mean, pairs.quantized_mean) + pairs.covariance  # mu mu^T + Sigma
    return halved(absorbing, second_moment, *percentile_weights(absorbing, bits, symmetric), bits, ridge), moved.float()
