"""Recipe `fast`: minutes, no gradients.

LayerNorms folded to common channel ranges; weights per output channel and activations per tensor with least-squares ranges; then every
output channel gets back the mean and the spread that it has in the float network (matching.py).
"""

from collections.abc import Mapping

from vitq.affine import QuantizedWeight, quantize_weight
from vitq.artifacts import BitPlan, Layer
from vitq.calibration.matching import match_moments
from vitq.checkpoint import Checkpoint
from vitq.fitting import fit_operand
from vitq.graph import Graph, assign, copy, tensor_of
from vitq.graph.dataflow import argument
from vitq.graph.layers import operand_nodes
from vitq.ranges import Batches, Histogram, fold, weight_ranges


def calibrate_fast(graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images; gone through three times.
        symmetric: weights without zero points, at every width.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    return fit_fast(*fold(graph, batches), plan, batches, symmetric)


def fit_fast(folded: Graph, histograms: Mapping[str, Histogram], plan: BitPlan, batches: Batches, symmetric: bool = False) -> Checkpoint:
    """The recipe from the folded graph on, which does not depend on the plan: one fold serves many plans.

    Args:
        folded: the folded graph (`ranges.fold`).
        histograms: of its activations, by `Operand.tensor`.
        plan: bits of every layer.
        batches: the calibration images; gone through once.
        symmetric: weights without zero points, at every width.
    """
    bits = plan.bits
    activations = {
        operand.tensor: fit_operand(histograms[operand.tensor], bits[layer.name].activation_bits, operand.role)
        for layer in folded.layers
        for operand in layer.activations
    }
    weights = {
        layer.name: _quantized(folded, layer, bits[layer.name].weight_bits, symmetric) for layer in folded.layers if layer.has_weight
    }
    weights, biases = match_moments(folded, activations, weights, batches)
    module = copy(folded)
    tensors = {layer.operands[1].tensor: weights[layer.name].dequantize() for layer in folded.layers if layer.has_weight}
    tensors |= {str(argument(folded.layer_node(name), 2).target): bias for name, bias in biases.items()}
    assign(module, tensors)
    module.recompile()
    return Checkpoint(Graph(module, folded.input_shape, folded.layers, folded.nodes, folded.blocks), plan, weights, activations)


def _quantized(graph: Graph, layer: Layer, bits: int | None, symmetric: bool) -> QuantizedWeight:
    assert bits is not None
    weight = tensor_of(graph.module, operand_nodes(graph.layer_node(layer.name))[1])
    return quantize_weight(weight, *weight_ranges(weight, bits, symmetric), bits)
