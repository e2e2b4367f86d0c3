"""Queries, keys and values as linears of their own where a model computes them in one: what a matmul reads then needs no cutting up.

A linear whose output is only cut into parts (unbind, chunk, select, slice) becomes one linear a part, with the rows of the weight that
the part shows. With P the position of each number of a part in the linear's output, found by running the shape ops on the positions,

    part = linear(x, W[rows], bias[rows]).reshape(sizes).permute(order)

holds where P is affine in the part's indices, and no row is in two parts; elsewhere the linear stays whole. Codes, scales and numbers
are the same; a split, a copy and a squeeze a part are gone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vitq.affine import QuantizedWeight
from vitq.artifacts import Layer
from vitq.checkpoint import Checkpoint
from vitq.graph import analyse, assign, copy, tensor_of
from vitq.graph.channels import carry
from vitq.graph.dataflow import BIJECTIVE, PARTIAL, aten, optional_argument

_LARGEST_INTEGER = 2**24  # that float32 counts to: ops of the graph may not take float64


@dataclass(frozen=True)
class _Part:
    """What one value shows of a linear's output: the rows, int64 (R,), and how the output of those rows becomes the value."""

    value: Node
    rows: Tensor
    sizes: list[int]
    order: list[int]


def split_linears(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, tuple[str, ...]]]:
    """The checkpoint with one linear for each part of a linear whose output is only cut into parts.

    Returns:
        The checkpoint, and the names of the layers that each of the original layers became; most became themselves.
    """
    module = copy(checkpoint.graph)
    nodes = {node.name: node for node in module.graph.nodes}
    rows_of: dict[str, Tensor] = {}  # by the name of a part's node
    parts_of: dict[str, list[str]] = {}  # by layer
    for layer in checkpoint.graph.layers:
        node = nodes[checkpoint.graph.nodes[layer.name]]
        if layer.op == "linear" and (parts := _parts(node)):
            made = [_insert(module, node, layer, index, part) for index, part in enumerate(parts)]
            rows_of |= {name: part.rows for name, part in zip(made, parts, strict=True)}
            parts_of[layer.name] = made
    if not parts_of:
        return checkpoint, {layer.name: (layer.name,) for layer in checkpoint.graph.layers}
    module.graph.eliminate_dead_code()
    graph = analyse(module, checkpoint.graph.input_shape)
    name_of = {node: name for name, node in graph.nodes.items()}
    became = {name: tuple(name_of[node] for node in parts_of.get(name, [node])) for name, node in checkpoint.graph.nodes.items()}
    origin = {part: layer for layer in checkpoint.graph.layers for part in became[layer.name]}
    weights = {
        layer.name: _rows(checkpoint.weights[origin[layer.name].name], rows_of.get(graph.nodes[layer.name]))
        for layer in graph.layers
        if layer.has_weight
    }
    activations = {
        ours.tensor: checkpoint.activations[theirs.tensor]
        for layer in graph.layers
        for ours, theirs in zip(layer.activations, origin[layer.name].activations, strict=True)
    }
    return replace(checkpoint, graph=graph, weights=weights, activations=activations), became


def _parts(linear: Node) -> list[_Part] | None:
    """The parts that make up all that is read of a linear's output, at least two; None where there are none such."""
    shape = linear.meta["val"].shape
    if shape.numel() > _LARGEST_INTEGER or len(linear.args) < 3 or any(len(node.users) > 1 for node in linear.all_input_nodes[1:]):
        return None
    positions = torch.arange(shape.numel(), dtype=torch.float32).reshape(shape)
    values = list(dict.fromkeys(_cuts(linear, shape.numel())))
    parts = [None if value is None else _part(linear, value, positions) for value in values]
    found = [part for part in parts if part is not None]
    rows = torch.cat([part.rows for part in found]) if found else torch.zeros(0)
    return found if len(found) == len(values) > 1 and len(rows.unique()) == len(rows) else None


def _cuts(node: Node, numel: int, part: Node | None = None) -> Iterator[Node | None]:
    """For each reader behind a node, what the last cut before it left; None for one that sees all of the node."""
    for user in node.users:
        if not (optional_argument(user, 0) is node and user.target in BIJECTIVE | PARTIAL):
            yield part
            continue
        value = user.meta["val"]
        left = value.numel() if isinstance(value, Tensor) else numel
        yield from _cuts(user, left, user if left < numel else part)


def _part(linear: Node, value: Node, positions: Tensor) -> _Part | None:
    found = carry(linear, positions, value)
    channels = positions.shape[-1]
    if found is None or not found.numel() or found.dim() < 2 or found.shape[0] != positions.shape[0]:
        return None
    token, channel = found.long() // channels, found.long() % channels
    rows = channel.unique()
    at = token * len(rows) + torch.searchsorted(rows, channel.contiguous())  # where the number is in the output of those rows
    strides = [int(at.select(axis, 1).flatten()[0]) if size > 1 else 0 for axis, size in enumerate(at.shape)]
    affine = torch.zeros_like(at)
    for axis, (size, stride) in enumerate(zip(at.shape, strides, strict=True)):
        affine += (torch.arange(size) * stride).reshape([-1 if axis == other else 1 for other in range(at.dim())])
    every = positions.numel() // channels * len(rows)
    outermost = at.shape[0] == 1 or strides[0] * at.shape[0] == every  # the batch's axis, of any size
    if not outermost or at.numel() != every or not torch.equal(affine, at):
        return None
    from_large = [0, *sorted(range(1, at.dim()), key=lambda axis: -strides[axis])]
    order = [from_large.index(axis) for axis in range(at.dim())]
    return _Part(value, rows, [-1, *(at.shape[axis] for axis in from_large[1:])], order)


def _insert(module: GraphModule, linear: Node, layer: Layer, index: int, part: _Part) -> str:
    """Puts a part's own linear in place of the value that it showed; returns the linear's node name."""
    weight, bias = (node for node in linear.all_input_nodes[1:])
    name = layer.operands[1].tensor.removesuffix(".weight")
    names = [f"{name}.{index}.weight", f"{name}.{index}.bias"]
    tensors = [tensor_of(module, node)[part.rows.to(tensor_of(module, node).device)] for node in (weight, bias)]
    assign(module, dict(zip(names, tensors, strict=True)))
    with module.graph.inserting_before(part.value):
        parameters = [module.graph.get_attr(name) for name in names]
        own = module.graph.call_function(aten.linear.default, (linear.args[0], *parameters))
        shaped = module.graph.call_function(aten.reshape.default, (own, part.sizes))
        shaped = module.graph.call_function(aten.permute.default, (shaped, part.order))
    own.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
    part.value.replace_all_uses_with(shaped)
    return own.name


def _rows(weight: QuantizedWeight, rows: Tensor | None) -> QuantizedWeight:
    if rows is None:
        return weight
    rows = rows.to(weight.codes.device)
    return QuantizedWeight(weight.codes[rows], weight.scale[rows], weight.zero_point[rows], weight.bits)
