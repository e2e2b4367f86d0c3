"""Gives every layer its own weight and bias where several read one (a convolution that all blocks of a stage share).

Each layer has its own bits, bias correction and folds, so it needs its own tensors. The function is the same; the copies are stored apart.
"""

from torch.fx import Node

from vitq.graph import Graph, analyse, assign, copy, tensor_of
from vitq.graph.dataflow import optional_argument


def own_weights(graph: Graph) -> Graph:
    """The graph in which no two layers read the same weight or bias; a copy is named after its layer."""
    read = [str(tensor.target) for layer in graph.layers if layer.has_weight for tensor in _tensors(graph.layer_node(layer.name))]
    if len(set(read)) == len(read):
        return graph
    module = copy(graph)
    nodes = {node.name: node for node in module.graph.nodes}
    taken: set[str] = set()
    for layer in graph.layers:
        node = nodes[graph.nodes[layer.name]]
        for index, suffix in ((1, "weight"), (2, "bias")) if layer.has_weight else ():
            tensor = optional_argument(node, index)
            if tensor is None or tensor.op != "get_attr":
                continue
            if (name := str(tensor.target)) in taken:
                name = f"{layer.name}.{suffix}" if name.endswith(f".{suffix}") else f"{name}_{node.name}"
                assign(module, {name: tensor_of(module, tensor).clone()})
                node.update_arg(index, _reader(node, tensor, name))
            taken.add(name)
    module.graph.eliminate_dead_code()
    return analyse(module, graph.input_shape)


def _tensors(layer: Node) -> list[Node]:
    found = [optional_argument(layer, index) for index in (1, 2)]
    return [tensor for tensor in found if tensor is not None and tensor.op == "get_attr"]


def _reader(layer: Node, original: Node, name: str) -> Node:
    with layer.graph.inserting_before(layer):
        node = layer.graph.get_attr(name)
    node.meta = dict(original.meta)
    return node
