"""Puts fake quantization on the operands of a graph's layers.

Every layer then reads quantize-dequantize(x) in place of x. The quantizer stands right before the layer, behind the shape-only ops
that lead there, as it will in the exported file; layers that read one tensor share its scale and zero point.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.fx import GraphModule, Node

from vitq.affine import QParams, quantize_dequantize
from vitq.graph import Graph, assign, copy
from vitq.graph.layers import operand_nodes


def fake_quantize(graph: Graph, activations: Mapping[str, QParams], weights: Mapping[str, Tensor] | None = None) -> GraphModule:
    """The graph's module with activations quantized and weights replaced; the graph itself stays as it is.

    Args:
        graph: the graph.
        activations: scale and zero point by `Operand.tensor`; a tensor without an entry stays float.
        weights: dequantized weights by layer name; a layer without an entry keeps its own.

    Returns:
        A module from images (B, 3, H, W) to the output.
    """
    module = copy(graph)
    nodes = {node.name: node for node in module.graph.nodes}
    done: dict[tuple[Node, QParams], Node] = {}
    for layer in graph.layers:
        node = nodes[graph.nodes[layer.name]]
        for position, operand in enumerate(layer.activations):
            qparams = activations.get(operand.tensor)
            if qparams is None:
                continue
            source = operand_nodes(node)[position]
            if (source, qparams) not in done:
                done[source, qparams] = _insert(module, node, source, qparams)
            node.update_arg(position, done[source, qparams])
        if weights and layer.name in weights:
            assign(module, {layer.operands[1].tensor: weights[layer.name]})
    module.graph.lint()
    module.recompile()
    return module


def _insert(module: GraphModule, before: Node, source: Node, qparams: QParams) -> Node:
    with module.graph.inserting_before(before):
        node = module.graph.call_function(quantize_dequantize, (source, qparams.scale, qparams.zero_point, qparams.bits))
    node.meta = {key: value for key, value in source.meta.items() if key == "val"}
    return node
