"""Folds a BatchNorm into the linear or convolution before it.

In eval mode BatchNorm is y = a x + c per channel, a = gamma / sqrt(var + eps), c = beta - a mean, so W' = a W and b' = a b + c
(rows scaled). One that follows something else stays as it is: it is float, cheap, and exact.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vitq.graph import Graph, analyse, assign, copy, tensor_of
from vitq.graph.channels import reaches_in_order
from vitq.graph.dataflow import BIJECTIVE, CONVOLUTIONS, argument, aten, consumers, optional_argument, walk_back
from vitq.rewrites.biases import bias_name, set_bias

_BATCHNORMS = {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}


def fold_batchnorm(graph: Graph) -> Graph:
    """The graph without the BatchNorms that follow a linear or convolution; its output is the same in exact arithmetic."""
    if not any(node.target in _BATCHNORMS for node in graph.module.graph.nodes):
        return graph
    module = copy(graph)
    for node in list(module.graph.nodes):
        if node.target in _BATCHNORMS and (layer := _producer(node)) is not None:
            _fold(module, layer, node)
    module.graph.eliminate_dead_code()
    return analyse(module, graph.input_shape)


def _producer(norm: Node) -> Node | None:
    """The layer whose output, and nothing else, the norm reads channel by channel."""
    node = walk_back(argument(norm, 0), BIJECTIVE)
    if any(user is not norm for user, _ in consumers(node, BIJECTIVE)) or optional_argument(norm, 3) is None:
        return None
    if node.target is aten.linear.default:
        channel_axis = -1
    elif node.target in CONVOLUTIONS:
        channel_axis = 1
    else:
        return None
    weight = argument(node, 1)
    if weight.op != "get_attr" or len(weight.users) > 1:
        return None
    return node if reaches_in_order(node, channel_axis, argument(norm, 0), 1) else None


def _fold(module: GraphModule, layer: Node, norm: Node) -> None:
    mean, variance = (tensor_of(module, argument(norm, index)).double() for index in (3, 4))
    epsilon = norm.args[7] if norm.target is aten.batch_norm.default else norm.args[6]
    assert isinstance(epsilon, float)
    scale = torch.rsqrt(variance + epsilon) * _parameter(module, norm, 1, torch.ones_like(mean))
    weight = tensor_of(module, argument(layer, 1))
    bias = _parameter(module, layer, 2, torch.zeros_like(mean))
    bias = scale * (bias - mean) + _parameter(module, norm, 2, torch.zeros_like(mean))
    weight_name = str(argument(layer, 1).target)
    assign(
        module,
        {
            weight_name: (weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype),
            bias_name(weight_name): bias.to(weight.dtype),
        },
    )
    set_bias(module, layer, bias_name(weight_name))
    norm.replace_all_uses_with(argument(norm, 0))


def _parameter(module: GraphModule, node: Node, index: int, default: Tensor) -> Tensor:
    found = optional_argument(node, index)
    return default if found is None else tensor_of(module, found).double()
