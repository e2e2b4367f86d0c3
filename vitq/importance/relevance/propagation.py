"""Walks a captured graph backwards, from the relevance of its output to that of its input, one rule an op.

One forward pass keeps every value; the walk gives each back as soon as its op is done. A value that several ops read gets the sum of
what they give it: with x sum_i (R_i / x), Chefer's rule for copies, that is the same wherever x is not 0. Where a graph writes into a
part of a value (mvitv2's position terms), the value counts as what it became, and what was written absorbs its share.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vitq.graph import Graph, tensor_of, values_at
from vitq.graph.dataflow import BIJECTIVE, PARTIAL, op_of, optional_argument, walk_back
from vitq.importance.relevance.shared import WITHOUT_RELEVANCE, epsilon_rule
from vitq.importance.relevance.step import Rules, Step, image_axis

Visit = Callable[[str, Tensor], None]
"""Called as visit(name of a node, relevance of its value), the last node first."""


@dataclass(frozen=True)
class Propagated:
    """`output` is the network's own, `pixels` the relevance of the images, in their shape.

    `without_rule` names the ops that took the epsilon rule for want of their own.
    """

    output: Tensor
    pixels: Tensor
    without_rule: frozenset[str]


def propagate(graph: Graph, images: Tensor, start: Callable[[Tensor], Tensor], rules: Rules, visit: Visit | None = None) -> Propagated:
    """Propagates relevance back to the images.

    Args:
        graph: any captured graph.
        images: (B, 3, H, W).
        start: from the output (B, ...) to its relevance, in the same shape.
        rules: a value of `RULES`.
        visit: sees the relevance of every value between, when it is complete.
    """
    with torch.no_grad():
        return _propagate(graph.module, images, start, rules, visit)


def _propagate(
    module: GraphModule, images: Tensor, start: Callable[[Tensor], Tensor], rules: Rules, visit: Visit | None
) -> Propagated:  # fmt: skip
    nodes = list(module.graph.nodes)
    images = images.to(next(module.parameters()).device)
    values = values_at(module, images, [node.name for node in nodes if node.op in ("placeholder", "call_function")])
    carrying = _carrying(nodes)
    (result,) = module.graph.output_node().all_input_nodes
    output = values[result.name]
    relevance: dict[Node, Any] = {result: start(output)}
    pixels, without_rule = torch.zeros_like(images), set()
    for node in reversed(nodes):
        arrived = relevance.pop(node, None)
        if arrived is not None:
            if visit is not None and isinstance(arrived, Tensor):
                visit(node.name, arrived)
            if node.op == "placeholder":
                pixels = arrived
            elif node.target is getitem:
                source, index = node.args
                relevance.setdefault(source, {})[index] = arrived
            else:
                if node.target not in rules:
                    without_rule.add(str(node.target))
                step, sources = _step(module, node, values, carrying, len(images))
                rule = rules.get(node.target, epsilon_rule)
                for source, part in zip(sources, rule(step, _complete(arrived, step.output)), strict=True):
                    relevance[source] = relevance[source] + part if source in relevance else part
        values.pop(node.name, None)
    return Propagated(output, pixels, frozenset(without_rule))


def _carrying(nodes: list[Node]) -> set[Node]:
    """The values that relevance may flow to: floating point, and computed from the image's values."""
    found: set[Node] = set()
    for node in nodes:
        reads = any(source in found for source in node.all_input_nodes)
        if node.op == "placeholder" or (reads and node.target not in WITHOUT_RELEVANCE and _holds_numbers(node.meta.get("val"))):
            found.add(node)
    return found


def _holds_numbers(value: Any) -> bool:
    parts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _step(module: GraphModule, node: Node, values: dict[str, Any], carrying: set[Node], images: int) -> tuple[Step, list[Node]]:
    """The op of a node with its values, and the nodes that its inputs come from."""

    def value_of(source: Node) -> Any:
        return tensor_of(module, source) if source.op == "get_attr" else values[source.name]

    sources, places = [], []
    for index, part in enumerate((*node.args, *node.kwargs.values())):
        read = [source for source in _nodes_in(part) if source in carrying]
        sources += read
        places += [index] * len(read)

    def compute(*inputs: Tensor) -> Any:
        given: Iterator[Tensor] = iter(inputs)

        def changed(source: Node) -> Any:
            return next(given) if source in carrying else value_of(source)

        return op_of(node)(*map_arg(node.args, changed), **map_arg(node.kwargs, changed))

    output, known = values[node.name], node.meta["val"]
    axis = image_axis(output.shape, known.shape, images) if isinstance(output, Tensor) else None
    read = optional_argument(node, 0)
    step = Step(
        name=node.name,
        op=op_of(node),
        arguments=map_arg(node.args, value_of),
        keywords=map_arg(node.kwargs, value_of),
        places=tuple(places),
        inputs=tuple(value_of(source) for source in sources),
        output=output,
        compute=compute,
        images=images,
        image_axis=axis,
        on_pixels=read is not None and walk_back(read, BIJECTIVE | PARTIAL).op == "placeholder",
    )
    return step, sources


def _nodes_in(part: Any) -> list[Node]:
    """The nodes in an argument, one for each time it is read."""
    found: list[Node] = []
    map_arg(part, found.append)
    return found


def _complete(arrived: Any, output: Any) -> Any:
    """The relevance of each part of an output of several, zeros for parts that nobody read."""
    if isinstance(output, Tensor):
        return arrived
    return tuple(arrived[index] if index in arrived else torch.zeros_like(part) for index, part in enumerate(output))
