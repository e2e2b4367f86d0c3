"""Runs a captured graph node by node: from the start or from a cached point, with chosen nodes intercepted.

Values that nobody needs any more are dropped as it goes, so that memory is that of an ordinary forward pass.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vitq.graph.dataflow import op_of, tensor_of

Intercept = Callable[..., Tensor]
"""Called as intercept(compute, *arguments) in place of a node; compute(*arguments) is the node's own op."""


def run(module: GraphModule, images: Tensor, intercepts: Mapping[str, Intercept] | None = None) -> Tensor:
    """The output of the graph for images (B, 3, H, W), on the graph's device; `intercepts` maps node names to what runs in their place."""
    return advance(module, start(module, images), None, None, intercepts)["output"]


def start(module: GraphModule, images: Tensor) -> dict[str, Any]:
    """The values alive before the first node: the images, on the graph's device."""
    (placeholder,) = (node for node in module.graph.nodes if node.op == "placeholder")
    return {placeholder.name: images.to(next(module.parameters()).device)}


def values_at(module: GraphModule, images: Tensor, names: Collection[str]) -> dict[str, Any]:
    """The values of the named nodes for images (B, 3, H, W), from one forward pass."""
    kept: dict[str, Any] = {}

    def keep(name: str) -> Intercept:
        def intercept(compute: Callable[..., Any], *arguments: Any) -> Any:
            kept[name] = compute(*arguments)
            return kept[name]

        return intercept

    (placeholder,) = (node for node in module.graph.nodes if node.op == "placeholder")
    run(module, images, {name: keep(name) for name in names})
    return {name: images if name == placeholder.name else kept[name] for name in names}


def advance(
    module: GraphModule,
    values: Mapping[str, Any],
    first: str | None,
    last: str | None,
    intercepts: Mapping[str, Intercept] | None = None,
) -> dict[str, Any]:
    """Runs the nodes from `first` up to but without `last`.

    Args:
        module: the graph.
        values: the values alive where `first` stands (`Block.inputs`), by node name.
        first: name of the first node to run; None for the beginning.
        last: name of the node to stop before; None to run to the end.
        intercepts: what runs in the place of nodes, by node name.

    Returns:
        The values alive at the stop, by node name; with `last` None, the graph's output under "output".
    """
    nodes = list(module.graph.nodes)
    names = [node.name for node in nodes]
    start = names.index(first) if first else 0
    stop = names.index(last) if last else len(nodes)
    position = {node: index for index, node in enumerate(nodes)}
    environment: dict[Node, Any] = {node: values[node.name] for node in nodes if node.name in values}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}

    def value_of(node: Node) -> Any:
        return tensor_of(module, node) if node.op == "get_attr" else environment[node]

    for index in range(start, stop):
        node = nodes[index]
        if node.op in ("get_attr", "placeholder") or node in environment:
            continue
        arguments = map_arg(node.args, value_of)
        if node.op == "output":
            return {"output": arguments[0]}
        environment[node] = _execute(module, node, arguments, map_arg(node.kwargs, value_of), (intercepts or {}).get(node.name))
        for source in node.all_input_nodes:
            if last_use[source] == index:
                environment.pop(source, None)
    return {node.name: value for node, value in environment.items() if last_use[node] >= stop}


def _execute(module: GraphModule, node: Node, arguments: Any, keywords: Any, intercept: Intercept | None) -> Any:
    compute = module.get_submodule(str(node.target)) if node.op == "call_module" else op_of(node)
    if intercept is None:
        return compute(*arguments, **keywords)
    return intercept(lambda *changed: compute(*changed, **keywords), *arguments)
