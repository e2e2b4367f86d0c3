"""Makes the module that torch.export returns plain: guards, dropout, needless casts and nested graphs gone, constants folded."""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.fx.node import map_arg

from vitq.errors import InputError
from vitq.graph.dataflow import assign, aten, tensor_of
from vitq.graph.inplace import without_inplace_ops
from vitq.graph.layers import CONSTANT

_NO_EFFECT = {
    aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.alias.default,
    aten.detach.default, aten.lift_fresh_copy.default,
}  # fmt: skip


def simplify(module: GraphModule, model_name: str) -> GraphModule:
    """The module of an exported program as plain ops from one input to one output, its constants folded.

    Raises:
        InputError: the model returns several values, or was captured for one batch size only.
    """
    graph = module.graph
    _inline_nested(module)
    for node in list(graph.nodes):
        if node.op == "call_module" or "assert" in str(node.target) or "constrain_range" in str(node.target):
            graph.erase_node(node)  # torch.export's guards on input shapes
        elif node.target in _NO_EFFECT or _is_needless_cast(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    output = graph.output_node()
    results = output.all_input_nodes
    if len(results) != 1 or not isinstance(results[0].meta.get("val"), Tensor):
        raise InputError(
            f"{model_name} returns {len(results)} values; vitq takes models that return one tensor (a classifier or a backbone)"
        )
    output.args = (results[0],)
    graph.set_codegen(CodeGen())
    (placeholder,) = (node for node in graph.nodes if node.op == "placeholder")
    if isinstance(results[0].meta["val"].shape[0], int):
        raise InputError(f"{model_name} was captured for a batch of {results[0].meta['val'].shape[0]} only; vitq needs a dynamic batch")
    _fold_constants(module, placeholder)
    without_inplace_ops(module)
    graph.eliminate_dead_code()
    simplified = GraphModule(module, graph)
    for parameter in simplified.parameters():
        parameter.requires_grad_(False)
    return simplified


def _inline_nested(module: GraphModule) -> None:
    """Puts the ops of nested graphs (a stretch under its own autocast setting, which the CPU's float32 has no use for) in their place."""
    for node in list(module.graph.nodes):
        graphs = [source for source in node.all_input_nodes if isinstance(getattr(module, str(source.target), None), GraphModule)]
        if not graphs or node.op != "call_function":
            continue
        (nested,) = graphs
        arguments = node.args[node.args.index(nested) + 1 :]
        inner = module.get_submodule(str(nested.target))
        assert isinstance(inner, GraphModule)
        placeholders = [inside for inside in inner.graph.nodes if inside.op == "placeholder"]
        with module.graph.inserting_before(node):
            results: Any = module.graph.graph_copy(inner.graph, dict(zip(placeholders, arguments, strict=True)))
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(results[user.args[1]])
                module.graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(results)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _is_needless_cast(node: Node) -> bool:
    """Whether a cast leaves the type as it was."""
    if node.target not in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout):
        return False
    source, value = node.args[0], node.meta.get("val")
    return isinstance(source, Node) and isinstance(value, Tensor) and value.dtype == source.meta["val"].dtype


def _fold_constants(module: GraphModule, placeholder: Node) -> None:
    """Computes once what depends on no image (position biases, masks, standardised weights) and stores it as a constant."""
    dependent = {placeholder}
    for node in module.graph.nodes:
        if any(source in dependent for source in node.all_input_nodes):
            dependent.add(node)
    values: dict[Node, Any] = {}
    for node in list(module.graph.nodes):
        if node in dependent or node.op == "output":
            continue
        if node.op == "get_attr":
            values[node] = tensor_of(module, node)
            continue
        with torch.no_grad():
            arguments, keywords = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments, **keywords)
        value = values[node]
        if isinstance(value, Tensor) and any(user in dependent or user.op == "output" for user in node.users):
            target = f"{CONSTANT}{node.name}"
            assign(module, {target: value.contiguous()})
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(target)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user in dependent or user.op == "output")
    for node in reversed(values):  # fx keeps ops that write (filling a mask), though nobody reads what they wrote
        if not node.users:
            module.graph.erase_node(node)
