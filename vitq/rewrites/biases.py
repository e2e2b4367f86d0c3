"""Gives every linear and convolution a bias, zero where it had none, so that calibration can correct it."""

import torch
from torch.fx import GraphModule, Node

from vitq.graph import Graph, analyse, assign, copy, tensor_of
from vitq.graph.dataflow import optional_argument
from vitq.graph.layers import operand_nodes


def give_biases(graph: Graph) -> Graph:
    """The graph in which every layer with a weight has a bias."""
    bare = [layer for layer in graph.layers if layer.has_weight and optional_argument(graph.layer_node(layer.name), 2) is None]
    if not bare:
        return graph
    module = copy(graph)
    nodes = {node.name: node for node in module.graph.nodes}
    for layer in bare:
        node = nodes[graph.nodes[layer.name]]
        weight = operand_nodes(node)[1]
        name = bias_name(str(weight.target))
        assign(module, {name: torch.zeros(layer.channels, device=tensor_of(module, weight).device)})
        set_bias(module, node, name)
    return analyse(module, graph.input_shape)


def set_bias(module: GraphModule, layer: Node, name: str) -> None:
    """Has a linear or convolution read its bias from the tensor `name`."""
    with module.graph.inserting_before(layer):
        bias = module.graph.get_attr(name)
    bias.meta["val"] = tensor_of(module, bias)
    layer.args = (*layer.args[:2], bias, *layer.args[3:])


def bias_name(weight: str) -> str:
    """The name of the bias that goes with a weight: `fc1.bias` with `fc1.weight`."""
    return weight.removesuffix("weight") + "bias" if weight.endswith("weight") else f"{weight}_bias"
