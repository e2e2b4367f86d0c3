"""Finds the layers of a captured graph: name, type, operands with roles, parameters and MACs, from the dataflow alone.

A layer is a linear or convolution whose weight is a parameter, or a matmul of two activations. Its type is read off its
neighbours: what feeds it, what its output reaches. Shapes are those of one image, as `analyse` leaves them in `node.meta["val"]`.
"""

import math

from torch.fx import GraphModule, Node

from vitq.artifacts import Layer, Operand, Operation, Role
from vitq.graph.channels import reaches_in_order
from vitq.graph.dataflow import (
    ACTIVATIONS,
    BIJECTIVE,
    CONVOLUTIONS,
    GELUS,
    MATMULS,
    NORMS,
    PARTIAL,
    SOFTMAXES,
    aten,
    consumers,
    module_path,
    walk_back,
)

SHAPE_ONLY = BIJECTIVE | PARTIAL
# What stands between a projection and the attention matmul that reads it: scaling, rotary embeddings, normalised queries.
_POINTWISE = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.neg.default, aten.cat.default, aten.stack.default} | NORMS
_BEFORE_SOFTMAX = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.masked_fill.Scalar, aten.where.self}


def find_layers(module: GraphModule, block_of: dict[str, str]) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers in the order of the graph, and the fx node of each.

    Args:
        module: a graph with one image's shapes in its nodes' metadata.
        block_of: the block of each node, by node name.

    Returns:
        The layers, and a dict from layer name to node name.
    """
    nodes = [node for node in module.graph.nodes if _operation(node) is not None]
    heads = _heads(module)
    layers: list[Layer] = []
    names: dict[str, str] = {}
    for node in nodes:
        kind = _type(node, heads)
        name = _unique(_name(node, kind), names)
        names[name] = node.name
        layers.append(_layer(node, name, kind, block_of.get(node.name, "")))
    return tuple(layers), names


def operand_nodes(node: Node) -> tuple[Node, Node]:
    """The two operands of a layer's node: (input, weight), or (left, right) of a matmul."""
    left, right = node.args[0], node.args[1]
    assert isinstance(left, Node) and isinstance(right, Node)
    return left, right


def _operation(node: Node) -> Operation | None:
    if node.op != "call_function" or len(node.args) < 2 or not isinstance(node.args[1], Node):
        return None
    constant = node.args[1].op == "get_attr"
    if node.target is aten.linear.default and constant:
        return "linear"
    if node.target in CONVOLUTIONS and constant:
        return "convolution"
    if node.target in MATMULS and not constant and isinstance(node.args[0], Node) and node.args[0].op != "get_attr":
        return "matmul"
    return None


def _layer(node: Node, name: str, kind: str, block: str) -> Layer:
    operation = _operation(node)
    assert operation is not None
    left, right = operand_nodes(node)
    output = math.prod(_shape(node))
    if operation == "matmul":
        macs, parameters, channels = output * _shape(left)[-1], 0, 0
    else:
        parameters, channels = math.prod(_shape(right)), _shape(right)[0]
        macs = output * parameters // channels
    operands = (_operand(left, operation), _operand(right) if operation == "matmul" else _weight(right))
    return Layer(name=name, type=kind, op=operation, block=block, parameters=parameters, channels=channels, macs=macs, operands=operands)


def _operand(node: Node, left_of: Operation | None = None) -> Operand:
    return Operand(tensor=walk_back(node, BIJECTIVE).name, role=_role(node, left_of), shape=_shape(node))


def _weight(node: Node) -> Operand:
    return Operand(tensor=str(node.target), role="weight", shape=_shape(node))


def _role(node: Node, left_of: Operation | None = None) -> Role:
    """The role of what a layer reads; "post_softmax" is a matmul's left operand whose rows, which it sums over, are a softmax's own."""
    source = walk_back(node, SHAPE_ONLY)
    if source.op == "placeholder":
        return "image"
    roles: tuple[tuple[set, Role], ...] = ((NORMS, "post_layernorm"), (SOFTMAXES, "post_softmax"), (GELUS, "post_gelu"))
    for targets, role in roles:
        if source.target in targets and (role != "post_softmax" or (left_of == "matmul" and _holds_rows(node, source))):
            return role
    return "plain"


def _holds_rows(node: Node, softmax: Node) -> bool:
    """Whether a softmax's axis is the last one of what shape ops made of it."""
    axis = int(softmax.args[1])  # type: ignore[arg-type]
    if node is softmax:
        return axis in (-1, len(_shape(node)) - 1)
    return reaches_in_order(softmax, axis, node, -1)


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def _type(node: Node, heads: set[Node]) -> str:
    left, right = operand_nodes(node)
    if _operation(node) == "matmul":
        if _reaches(node, SOFTMAXES, SHAPE_ONLY | _BEFORE_SOFTMAX):
            return "qk"
        from_softmax = any(_comes_from(side, SOFTMAXES) for side in (left, right))
        return "av" if from_softmax else "other"
    if _role(left) == "image":
        return "patch_embed"
    if node in heads:
        return "head"
    last = _name(node, "").rsplit(".", 1)[-1]
    if "reduction" in last or "downsample" in last:
        return "reduction"
    if kind := _projection(node):
        return kind
    source = walk_back(left, SHAPE_ONLY)
    if source.target in MATMULS or _comes_from(left, MATMULS):
        return "proj"
    if source.target in ACTIVATIONS:
        return "fc2"
    if any(user.target in ACTIVATIONS for user, _ in consumers(node, SHAPE_ONLY)):
        return "fc1"
    return {"proj": "proj", "fc1": "fc1", "fc2": "fc2"}.get(last, "other")


def _projection(node: Node) -> str | None:
    """Whether a linear makes queries, keys or values: "qkv", or "q", "k", "v", "kv" where they are apart."""
    parts = set()
    for user, argument in _readers(node):
        if user.target not in MATMULS:
            continue
        if _reaches(user, SOFTMAXES, SHAPE_ONLY | _BEFORE_SOFTMAX):
            parts.add("q" if user.args[0] is argument else "k")
        elif any(isinstance(side, Node) and side is not argument and _comes_from(side, SOFTMAXES) for side in user.args):
            parts.add("v")
    return "".join(part for part in "qkv" if part in parts) or None if len(parts) != 2 or parts == {"k", "v"} else "qkv"


def _readers(node: Node) -> list[tuple[Node, Node]]:
    """Users of a value through shape-only and pointwise ops, up to the next layer."""
    found: list[tuple[Node, Node]] = []
    pending, seen = [node], {node}
    while pending:
        for user, argument in consumers(pending.pop(), SHAPE_ONLY):
            if user.target in _POINTWISE:
                if user not in seen and "residual" not in user.meta:
                    seen.add(user)
                    pending.append(user)
            else:
                found.append((user, argument))
    return found


def _reaches(node: Node, targets: set, through: set) -> bool:
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target in targets:
                return True
            if user.target in through and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _comes_from(node: Node, targets: set) -> bool:
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.target in targets:
            return True
        if current.target in SHAPE_ONLY | {aten.mul.Tensor, aten.div.Tensor}:
            for source in current.all_input_nodes[:1]:
                if source not in seen:
                    seen.add(source)
                    pending.append(source)
    return False


def _heads(module: GraphModule) -> set[Node]:
    """The linears whose output is the graph's output, or is averaged into it (distilled models have two)."""
    (output,) = module.graph.output_node().all_input_nodes[:1]
    return _head_sources(output) or set()


def _head_sources(node: Node) -> set[Node] | None:
    node = walk_back(node, SHAPE_ONLY)
    if node.target is aten.linear.default:
        return {node}
    if node.target in (aten.add.Tensor, aten.div.Tensor, aten.mul.Tensor, aten.mean.dim, aten.stack.default):
        sources = [_head_sources(source) for source in node.all_input_nodes]
        return set().union(*sources) if sources and all(sources) else None  # type: ignore[arg-type]
    return None


def _name(node: Node, kind: str) -> str:
    path = module_path(node)
    if _operation(node) == "matmul":
        return f"{path}.{kind if kind in ('qk', 'av') else 'matmul'}".lstrip(".")
    target = str(operand_nodes(node)[1].target)
    if target.startswith(CONSTANT):
        return path or target
    return target.removesuffix(".weight")


CONSTANT = "constant_"
"""How the names of folded constants begin: such a weight is computed, so its layer is named after the module."""


def _unique(name: str, taken: dict[str, str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    return candidate
