"""Folds per-channel scales and shifts of LayerNorm outputs into the LayerNorm and into the layers that read it.

Post-LayerNorm channels differ by orders of magnitude, and one scale for all of them wastes codes. Channel c with range
[low_c, high_c] gets scale s_c = high_c - low_c and zero point z_c = -low_c / s_c; with z* their mean, r_c = s_c and t_c = s_c (z_c - z*),

    gamma' = gamma / r      beta' = (beta + t) / r      W' = W diag(r)      b' = b - W t

computes the same function, and one pair (1, z*) now serves all channels of the LayerNorm's output as well as (s_c, z_c) served
each. From RepQ-ViT (Li et al., ICCV 2023, section 3.2). Differs from the paper: the ranges do not depend on the bit-width, so that one
folded graph serves every width that is priced; the common scale is 1 and not the mean of the s_c, so that a checkpoint and the same one
rescaled exactly give one graph; z* need not be whole here, because the per-tensor zero point is fitted, and rounded, on the folded
tensor afterwards. Where padding enters between the norm and its readers, and for RMSNorm, t is 0.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vitq.graph import Graph, analyse, assign, copy, tensor_of
from vitq.graph.channels import arrives
from vitq.graph.dataflow import BIJECTIVE, NORMS, PARTIAL, argument, aten, consumers, optional_argument
from vitq.graph.layers import operand_nodes
from vitq.rewrites.biases import bias_name, set_bias
from vitq.rewrites.channel_range import ChannelRange


def foldable_norms(graph: Graph) -> dict[str, bool]:
    """The LayerNorms that only linears read, channel for channel, by node name; the value says whether a shift may be folded too."""
    linears = {graph.nodes[layer.name] for layer in graph.layers if layer.op == "linear"}
    found = {}
    for node in graph.module.graph.nodes:
        if node.target in NORMS and (shiftable := _foldable(node, linears)) is not None:
            found[node.name] = shiftable
    return found


def norm_readers(graph: Graph) -> dict[str, list[str]]:
    """The layers that read each foldable LayerNorm, by the norm's node name."""
    layers = {node: layer for layer, node in graph.nodes.items()}
    norms = foldable_norms(graph)
    nodes = (node for node in graph.module.graph.nodes if node.name in norms)
    return {norm.name: [layers[reader.name] for reader in dict(consumers(norm, BIJECTIVE | PARTIAL))] for norm in nodes}


def fold_layernorms(graph: Graph, ranges: Mapping[str, ChannelRange] | None = None) -> Graph:
    """The graph with all foldable LayerNorms folded to common channel ranges; its output is the same in exact arithmetic.

    Args:
        graph: the graph.
        ranges: of every foldable norm's output, by node name; None leaves all values as they are and only makes the structure that
            a fold leaves (every norm affine, every reader with a bias), into which a checkpoint's tensors are loaded.
    """
    norms = foldable_norms(graph).items() if ranges is not None else ()
    return fold_factors(graph, {name: _fold_factors(ranges[name], shiftable) for name, shiftable in norms})  # type: ignore[index]


def fold_factors(graph: Graph, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Graph:
    """The graph with r and t of the module's equations folded as they are given, its output the same in exact arithmetic.

    Args:
        graph: the graph.
        factors: r and t, float64 (C,) each, by the name of a foldable norm's node; t is 0 where no shift may be folded. A norm without
            an entry keeps its values and gets the structure alone.
    """
    module = copy(graph)
    nodes = {node.name: node for node in module.graph.nodes}
    for name in foldable_norms(graph):
        _fold(module, nodes[name], *factors.get(name, (None, None)), has_bias=nodes[name].target is aten.layer_norm.default)
    if len(module.graph.nodes) > len(nodes):  # parameters that a norm or a reader did not have
        return analyse(module, graph.input_shape)
    module.recompile()
    return replace(graph, module=module)


def _foldable(norm: Node, linears: set[str]) -> bool | None:
    if len(norm.args[1]) != 1:  # type: ignore[arg-type]
        return None
    shiftable = norm.target is aten.layer_norm.default
    readers = list(consumers(norm, BIJECTIVE | PARTIAL))
    for user, value in readers:
        if user.name not in linears or user.args[0] is not value or len(argument(user, 1).users) > 1:
            return None
        in_order, padded = arrives(norm, -1, value, -1)
        if not in_order:
            return None
        shiftable = shiftable and not padded
    parameters = [parameter for parameter in norm.args[2:4] if isinstance(parameter, Node)]
    if not readers or any(parameter.op != "get_attr" or len(parameter.users) > 1 for parameter in parameters):
        return None
    return shiftable


def _fold_factors(channels: ChannelRange, shiftable: bool) -> tuple[Tensor, Tensor]:
    """The r and t of the module's equations, float64 (C,)."""
    low, high = channels.low.double(), channels.high.double()
    if not shiftable:
        high = torch.maximum(high, -low)
        low = -high
    width = high - low
    varies = width > 1e-6 * torch.maximum(high.abs(), low.abs())
    scale = torch.where(varies, width, torch.ones_like(width))
    if not shiftable:
        return scale, torch.zeros_like(width)
    zero_point = -low / scale
    common = zero_point[varies].mean() if bool(varies.any()) else zero_point.new_zeros(())
    return scale, torch.where(varies, scale * (zero_point - common), -low)  # a constant channel becomes 0, which every range holds


def _fold(module: GraphModule, norm: Node, scale: Tensor | None, shift: Tensor | None, has_bias: bool) -> None:
    channels = int(norm.args[1][0])  # type: ignore[index]
    device = norm.meta["val"].device
    gamma = _parameter(module, norm, 2, torch.ones(channels, device=device))
    _give(module, norm, 2, "weight", gamma if scale is None else (gamma.double() / scale).float())
    if has_bias:
        beta = _parameter(module, norm, 3, torch.zeros(channels, device=device))
        _give(module, norm, 3, "bias", beta if scale is None or shift is None else ((beta.double() + shift) / scale).float())
    for reader in dict(consumers(norm, BIJECTIVE | PARTIAL)):
        weight_name = str(operand_nodes(reader)[1].target)
        weight = tensor_of(module, operand_nodes(reader)[1])
        bias_node = optional_argument(reader, 2)
        bias, name = _parameter(module, reader, 2, weight.new_zeros(weight.shape[0])), bias_name(weight_name)
        if bias_node is not None:
            name = str(bias_node.target)
        tensors = {weight_name: weight, name: bias}
        if scale is not None and shift is not None:
            tensors = {weight_name: (weight.double() * scale).float(), name: (bias.double() - weight.double() @ shift).float()}
        assign(module, tensors)
        if bias_node is None:
            set_bias(module, reader, name)


def _parameter(module: GraphModule, node: Node, index: int, default: Tensor) -> Tensor:
    found = optional_argument(node, index)
    return default if found is None else tensor_of(module, found)


def _give(module: GraphModule, norm: Node, index: int, suffix: str, value: Tensor) -> None:
    if (found := optional_argument(norm, index)) is not None:
        assign(module, {str(found.target): value})
        return
    target = f"{norm.name}_{suffix}"
    assign(module, {target: value})
    with module.graph.inserting_before(norm):
        node = module.graph.get_attr(target)
    arguments = list(norm.args) + [None] * (index + 1 - len(norm.args))
    arguments[index] = node
    norm.args = tuple(arguments)
