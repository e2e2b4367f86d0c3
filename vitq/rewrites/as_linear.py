"""Writes patch embeddings, 1x1 convolutions and products with a constant matrix as linears.

A convolution whose kernel is its stride cuts the image into patches and multiplies each by one matrix; a 1x1 convolution does so
pixel by pixel. As linears they run on integer matrix kernels, which need no quantized output. Exact: the same products, summed.
"""

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from vitq.graph import Graph, analyse, assign, copy, tensor_of
from vitq.graph.dataflow import CONVOLUTIONS, MATMULS, argument, aten, optional_argument


def convolutions_as_linears(graph: Graph) -> Graph:
    """The graph with patchifying and 1x1 convolutions, and matmuls by a constant (K, N) matrix, as linears."""
    module = copy(graph)
    for node in list(module.graph.nodes):
        if node.target in CONVOLUTIONS and _is_patchwise(node):
            _convolution_as_linear(module, node)
        elif node.target in MATMULS and _is_constant_product(node):
            _product_as_linear(module, node)
    module.graph.eliminate_dead_code()
    return analyse(module, graph.input_shape)


def _is_patchwise(node: Node) -> bool:
    weight = argument(node, 1)
    if weight.op != "get_attr" or len(weight.users) > 1:
        return False
    stride, padding, dilation, groups = _settings(node)
    kernel = tuple(weight.meta["val"].shape[2:])
    size = tuple(argument(node, 0).meta["val"].shape[2:])
    patches = len(kernel) <= 2 and (kernel == stride or set(kernel) == {1})
    return patches and groups == 1 and set(dilation) == {1} and not any(padding) and len(size) == len(kernel)


def _settings(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Stride, padding and dilation, one number an axis, and groups."""
    kernel = argument(node, 1).meta["val"].shape[2:]
    dimensions = len(kernel)
    given: list[Any] = [*node.args[3:], *[None] * 4]
    defaults = (1, 0, 1, 1)
    stride, padding, dilation, groups = (default if value is None else value for value, default in zip(given, defaults, strict=False))
    if padding == "valid":
        padding = 0
    if padding == "same":
        padding = [int(size) - 1 for size in kernel]
    return _each(stride, dimensions), _each(padding, dimensions), _each(dilation, dimensions), groups


def _each(value: int | list[int], dimensions: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * dimensions if len(values) == 1 else values)


def _convolution_as_linear(module: GraphModule, node: Node) -> None:
    image, weight = argument(node, 0), argument(node, 1)
    stride, *_ = _settings(node)
    outputs, channels, *kernel = (int(size) for size in weight.meta["val"].shape)
    size = [int(length) for length in image.meta["val"].shape[2:]]
    patch = tuple(kernel)
    counts = [(length - edge) // step + 1 for length, edge, step in zip(size, patch, stride, strict=True)]
    new = _Inserter(module, node)
    x = image
    for axis, (length, edge, step, count) in enumerate(zip(size, patch, stride, counts, strict=True), start=2):
        if edge == 1 and step > 1:
            x = new(aten.slice.Tensor, x, axis, 0, length, step)
        elif count * edge < length:
            x = new(aten.slice.Tensor, x, axis, 0, count * edge)
    if len(patch) == 2 and patch != (1, 1):  # (B, C, H, W) -> (B, H/k, W/k, C, k, k) -> (B, H/k, W/k, C k k)
        x = new(aten.reshape.default, x, [-1, channels, counts[0], patch[0], counts[1], patch[1]])
        x = new(aten.permute.default, x, [0, 2, 4, 1, 3, 5])
        x = new(aten.reshape.default, x, [-1, *counts, channels * patch[0] * patch[1]])
    elif len(patch) == 1 and patch != (1,):
        x = new(aten.reshape.default, x, [-1, channels, counts[0], patch[0]])
        x = new(aten.permute.default, x, [0, 2, 1, 3])
        x = new(aten.reshape.default, x, [-1, counts[0], channels * patch[0]])
    else:
        x = new(aten.permute.default, x, [0, *range(2, 2 + len(patch)), 1])
    assign(module, {str(weight.target): tensor_of(module, weight).reshape(outputs, -1).contiguous()})
    x = new(aten.linear.default, x, weight, optional_argument(node, 2))
    x = new(aten.permute.default, x, [0, 1 + len(patch), *range(1, 1 + len(patch))])
    x.meta["val"] = node.meta["val"]  # a convolution that reads it may come next
    node.replace_all_uses_with(x)
    module.graph.erase_node(node)


def _is_constant_product(node: Node) -> bool:
    left, right = optional_argument(node, 0), optional_argument(node, 1)
    return (
        right is not None
        and right.op == "get_attr"
        and right.meta["val"].dim() == 2
        and left is not None
        and left.op != "get_attr"
        and left.meta["val"].dim() >= 2
        and len(right.users) == 1
    )


def _product_as_linear(module: GraphModule, node: Node) -> None:
    left, right = argument(node, 0), argument(node, 1)
    assign(module, {str(right.target): tensor_of(module, right).T.contiguous()})
    linear = _Inserter(module, node)(aten.linear.default, left, right)
    linear.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(linear)
    module.graph.erase_node(node)


class _Inserter:
    """Puts new ops before a node, in the name of that node's module."""

    def __init__(self, module: GraphModule, before: Node) -> None:
        self._graph, self._before = module.graph, before

    def __call__(self, target: Callable[..., Any], *arguments: Any) -> Node:
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, arguments)
        node.meta = {key: value for key, value in self._before.meta.items() if key == "nn_module_stack"}
        return node
