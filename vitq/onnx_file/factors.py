"""Folds a number by which all of a linear's output is multiplied, such as attention's 1 / sqrt(d), into the linear.

c (W x + b)  =  (c W) x + c b        the codes of W stay, its scales become c times as large
"""

from dataclasses import replace

from torch.fx import Node

from vitq.affine import QuantizedWeight
from vitq.checkpoint import Checkpoint
from vitq.graph import analyse, assign, copy, tensor_of
from vitq.graph.channels import is_factor
from vitq.graph.dataflow import BIJECTIVE, aten


def fold_numbers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without the positive numbers that follow a linear and are all that reads it, but for shape ops between."""
    module = copy(checkpoint.graph)
    nodes = {node.name: node for node in module.graph.nodes}
    weights, folded = dict(checkpoint.weights), False
    for layer in checkpoint.graph.layers:
        linear = nodes[checkpoint.graph.nodes[layer.name]]
        parameters = linear.all_input_nodes[1:]
        if layer.op != "linear" or any(len(node.users) > 1 for node in parameters):
            continue
        while (node := _only_factor(linear)) is not None:
            number = float(node.args[1]) ** (1 if node.target is aten.mul.Tensor else -1)  # type: ignore[arg-type]
            assign(module, {str(parameter.target): number * tensor_of(module, parameter) for parameter in parameters})
            weight = weights[layer.name]
            weights[layer.name] = QuantizedWeight(weight.codes, number * weight.scale, weight.zero_point, weight.bits)
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
            folded = True
    if not folded:
        return checkpoint
    graph = analyse(module, checkpoint.graph.input_shape)
    activations = {
        ours.tensor: checkpoint.activations[theirs.tensor]
        for layer, before in zip(graph.layers, checkpoint.graph.layers, strict=True)
        for ours, theirs in zip(layer.activations, before.activations, strict=True)
    }
    return replace(checkpoint, graph=graph, weights=weights, activations=activations)


def _only_factor(linear: Node) -> Node | None:
    """The factor that is all that reads a value, through ops that move all of it."""
    node = linear
    while len(node.users) == 1:
        (node,) = node.users
        if is_factor(node):
            return node if float(node.args[1]) > 0 else None  # type: ignore[arg-type]
        if node.target not in BIJECTIVE:
            return None
    return None
