"""Puts fake quantization on the operands of a graph's layers.

Every layer then reads quantize-dequantize(x) in place of x. The quantizer stands right before the layer, behind the shape-only ops
that lead there, as it will in the exported file; layers that read one tensor share its quantizer.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from vitq.graph import Graph, assign, copy
from vitq.graph.layers import operand_nodes
from vitq.quantizers import Quantizer


class _FakeQuantizer(nn.Module):
    """A quantizer as a module of a graph."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer.quantize_dequantize(x)


def fake_quantize(graph: Graph, activations: Mapping[str, Quantizer], weights: Mapping[str, Tensor] | None = None) -> GraphModule:
    """The graph's module with activations quantized and weights replaced; the graph itself stays as it is.

    Args:
        graph: the graph.
        activations: their quantizers by `Operand.tensor`; a tensor without an entry stays float.
        weights: dequantized weights by layer name; a layer without an entry keeps its own.

    Returns:
        A module from images (B, 3, H, W) to the output.
    """
    module = copy(graph)
    nodes = {node.name: node for node in module.graph.nodes}
    done: dict[tuple[Node, Quantizer], Node] = {}
    for layer in graph.layers:
        node = nodes[graph.nodes[layer.name]]
        for position, operand in enumerate(layer.activations):
            quantizer = activations.get(operand.tensor)
            if quantizer is None:
                continue
            source = operand_nodes(node)[position]
            if (source, quantizer) not in done:
                done[source, quantizer] = _insert(module, node, source, quantizer)
            node.update_arg(position, done[source, quantizer])
        if weights and layer.name in weights:
            assign(module, {layer.operands[1].tensor: weights[layer.name]})
    module.graph.lint()
    module.recompile()
    return module


def _insert(module: GraphModule, before: Node, source: Node, quantizer: Quantizer) -> Node:
    name = f"quantizer_{sum(name.startswith('quantizer_') for name, _ in module.named_children())}"
    module.add_module(name, _FakeQuantizer(quantizer))
    with module.graph.inserting_before(before):
        node = module.graph.call_module(name, (source,))
    node.meta = {key: value for key, value in source.meta.items() if key == "val"}
    return node
