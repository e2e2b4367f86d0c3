"""The checkpoint of a folded graph, its quantized weights, their layers' biases, and its activations' quantizers."""

from collections.abc import Mapping

from torch import Tensor

from vitq.affine import QuantizedWeight
from vitq.artifacts import BitPlan
from vitq.checkpoint import Checkpoint
from vitq.graph import Graph, assign, copy
from vitq.graph.dataflow import argument
from vitq.quantizers import Quantizer


def assemble(
    folded: Graph,
    plan: BitPlan,
    weights: Mapping[str, QuantizedWeight],
    activations: Mapping[str, Quantizer],
    biases: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Puts the parts of a calibrated model together.

    Args:
        folded: the float graph that was quantized; stays as it is.
        plan: bits of every layer, which the parts have.
        weights: of every layer that has one, by layer name.
        activations: by `Operand.tensor`.
        biases: float32 (O,) by layer name; a layer without an entry keeps its own.
    """
    module = copy(folded)
    tensors = {layer.operands[1].tensor: weights[layer.name].dequantize() for layer in folded.layers if layer.has_weight}
    tensors |= {str(argument(folded.layer_node(name), 2).target): bias for name, bias in (biases or {}).items()}
    assign(module, tensors)
    module.recompile()
    graph = Graph(module, folded.input_shape, folded.layers, folded.nodes, folded.blocks)
    return Checkpoint(graph, plan, dict(weights), dict(activations), floats=folded)
