"""From the captured graph to ONNX, with each layer left as one node to be lowered later.

The layers' nodes are replaced by `vitq` ops that know only their layer's name and the shape of their output; the rest, every float op
between them, goes through torch.onnx's own exporter. No weight enters the trace, so it costs no more than the float ops.

Leaves out: everything about codes and scales; see lowering.py.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from vitq.errors import InputError
from vitq.graph import Graph, copy

DOMAIN = "vitq"
OPSET = 21


def trace_graph(graph: Graph, opset: int = OPSET, batch: int | None = None) -> ir.Model:
    """The ONNX model of a graph in which layer `name` is a node of domain "vitq" with that name in its attribute `layer`.

    Its inputs are the layer's activations and, where there is one, the bias; its op is "linear", "matmul" or "convolution" (with
    ONNX's attributes strides, pads, dilations, group). The model's input is `images`, its output `output`.

    Args:
        graph: the graph to write.
        opset: of the ops between the layers.
        batch: how many images the model takes; None for any number.

    Raises:
        InputError: torch.onnx cannot express some op of the graph.
    """
    module = copy(graph)
    of_node = {node: name for name, node in graph.nodes.items()}
    for node in list(module.graph.nodes):
        if node.name in of_node:
            _replace(node, of_node[node.name])
    module.graph.eliminate_dead_code()
    module.recompile()
    (placeholder,) = (node for node in graph.module.graph.nodes if node.op == "placeholder")
    example = torch.zeros(batch or 2, *graph.input_shape, device=placeholder.meta["val"].device)
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet("torch.onnx"), _quiet("onnxscript"):
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=False)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                external_data=False,
                verbose=False,
                input_names=["images"],
                output_names=["output"],
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise InputError(
            f"torch.onnx cannot express this model at opset {opset}: {reason}; it cannot be exported with this version of torch"
        ) from error
    assert onnx_program is not None
    model = onnx_program.model
    model.graph.inputs[0].shape = ir.Shape([batch or "batch", *graph.input_shape])
    _own_constants(model)
    return model


def _own_constants(model: ir.Model) -> None:
    """Registers constants that nodes use but the graph does not hold: onnxscript leaves such bounds where it makes a Clip of Min, Max."""
    for node in model.graph:
        for value in node.inputs:
            loose = value is not None and value.producer() is None and not value.is_graph_input() and value.const_value is not None
            if loose and value is not None and model.graph.initializers.get(str(value.name)) is not value:
                if value.name in model.graph.initializers:
                    value.name = f"{value.name}_{node.name}"
                model.graph.register_initializer(value)


def _replace(node: Node, layer: str) -> None:
    target = str(node.target)
    if "linear" in target:
        x, weight, bias = _arguments(node, 3)
        node.args = (x, bias, int(weight.meta["val"].shape[0]), layer)
        node.target = _linear
    elif "conv" in target:
        x, weight, bias, stride, padding, dilation, groups = _arguments(node, 7)
        node.args = (x, bias, *_convolution_settings(weight.meta["val"].shape, stride, padding, dilation), groups or 1, layer)
        node.target = _convolution
    else:
        node.args = (*node.args[:2], layer)
        node.target = _matmul
    node.kwargs = {}


def _linear(x: Tensor, bias: Tensor | None, channels: int, layer: str) -> Tensor:
    return _node("linear", (x, bias), (*x.shape[:-1], channels), {"layer": layer})


def _matmul(left: Tensor, right: Tensor, layer: str) -> Tensor:
    leading = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return _node("matmul", (left, right), (*leading, left.shape[-2], right.shape[-1]), {"layer": layer})


def _convolution(
    x: Tensor,
    bias: Tensor | None,
    weight: Sequence[int],
    stride: Sequence[int],
    pads: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    layer: str,
) -> Tensor:
    axes = len(weight) - 2
    size = [(x.shape[2 + i] + pads[i] + pads[axes + i] - dilation[i] * (weight[2 + i] - 1) - 1) // stride[i] + 1 for i in range(axes)]
    attributes = {"layer": layer, "strides": list(stride), "pads": list(pads), "dilations": list(dilation), "group": groups}
    return _node("convolution", (x, bias), (x.shape[0], weight[0], *size), attributes)


def _node(op: str, inputs: tuple[Tensor | None, ...], shape: tuple[Any, ...], attributes: dict[str, Any]) -> Tensor:
    present = [value for value in inputs if value is not None]
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{op}", present, attributes, dtype=present[0].dtype, shape=shape, version=1)


def _convolution_settings(
    weight: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Weight shape, stride, ONNX's pads (all begins, then all ends) and dilation, one number an axis, from any of torch's spellings."""
    axes = len(weight) - 2
    dilation = _each(dilation, 1, axes)
    if padding == "same":
        total = [step * (int(size) - 1) for step, size in zip(dilation, weight[2:], strict=True)]
        begin = [pad // 2 for pad in total]
        pads = begin + [pad - first for pad, first in zip(total, begin, strict=True)]
    else:
        pads = _each(0 if padding == "valid" else padding, 0, axes) * 2
    return [int(size) for size in weight], _each(stride, 1, axes), pads, dilation


def _each(value: Any, default: int, axes: int) -> list[int]:
    values = [default] if value is None else [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _arguments(node: Node, count: int) -> list[Any]:
    """The first `count` arguments in the order of the op's schema, None where one is not given."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [given.get(name) for name in names[:count]]


class _quiet:
    """Keeps a logger's warnings off stderr for a while."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
