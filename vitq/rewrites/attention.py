"""Rescales attention's channels to one form: value rows against the output projection's columns, query rows against key rows.

A value channel c times s_c and the projection's column c divided by it is the same function, since attention mixes tokens and not
channels; so is a query channel times s_d and the key channel that it meets divided by it. How a checkpoint happens to be scaled is
chance, and one scale for a tensor suffers from it as it does from LayerNorm's outliers. With r the largest magnitude of a channel on the
images, w the norm of its column and p = r w,

    value, projection:    s_c = sqrt(p_c) / r_c                          range and column both become sqrt(p_c)
    query, key:           s_d = sqrt(r^q_d r^k_d) / r^q_d                both ranges become sqrt(r^q_d r^k_d)

p and r^q r^k do not change when a checkpoint is rescaled so, nor therefore does the result. What is between must be shape-only ops and
factors of a single number, proven by running them on the channels' numbers (channels.py); where it is not, as behind rotary embeddings or
normalised queries, nothing is rescaled.

The balance is that of SmoothQuant (Xiao et al., ICML 2023, equation 4, alpha = 1/2). Differs from the paper: its pairs are a LayerNorm and
the linears that read it, which have a fold of their own here (layernorm.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vitq.graph import Graph, assign, copy, tensor_of
from vitq.graph.channels import carry, is_factor, numbered
from vitq.graph.dataflow import BIJECTIVE, MATMULS, PARTIAL, optional_argument, reads_values
from vitq.rewrites.channel_range import ChannelRange

_NEGLIGIBLE = 1e-6  # of the largest p: below it a channel keeps its scale


@dataclass(frozen=True)
class Side:
    """One linear of a coupling by node name, and its coupled channels: rows of its weight, or columns with `columns`; int64 (K,)."""

    linear: str
    channels: Tensor
    columns: bool = False


@dataclass(frozen=True)
class Coupling:
    """Channels that may be multiplied in the first linear's output and divided in the second, one by one."""

    first: Side
    second: Side


def couplings(graph: Graph) -> list[Coupling]:
    """The provable couplings of a graph, in its order; no channel is in two."""
    nodes = {node.name: node for node in graph.module.graph.nodes}
    linears = [nodes[graph.nodes[layer.name]] for layer in graph.layers if layer.op == "linear"]
    free = {node for node in linears if all(parameter.op == "get_attr" and len(parameter.users) == 1 for parameter in _parameters(node))}
    found = [coupling for matmul in nodes.values() if matmul.target in MATMULS for coupling in _around(matmul, free)]
    return [coupling for coupling in found if all(_only_here(nodes[side.linear], side) for side in (coupling.first, coupling.second))]


def rescale_attention(graph: Graph, found: Sequence[Coupling], ranges: Mapping[str, ChannelRange]) -> Graph:
    """The graph with its coupled channels brought to one form; its output is the same in exact arithmetic.

    Args:
        graph: a graph whose linears have biases.
        found: its couplings.
        ranges: of the output of every linear whose rows are coupled, by node name.
    """
    module = copy(graph)
    nodes = {node.name: node for node in module.graph.nodes}
    for coupling in found:
        sizes = [_size(module, nodes, side, ranges) for side in (coupling.first, coupling.second)]
        product = sizes[0] * sizes[1]
        scale = torch.where(product > _NEGLIGIBLE * product.max(), product.sqrt() / sizes[0], 1.0)
        _scale(module, nodes, coupling.first, scale)
        _scale(module, nodes, coupling.second, 1 / scale)
    module.recompile()
    return replace(graph, module=module)


def _around(matmul: Node, free: set[Node]) -> Iterator[Coupling]:
    """The couplings through one matmul: its operands' channels with each other, or its right operand's with those of a reader."""
    left, right = matmul.args[0], matmul.args[1]
    if not (isinstance(left, Node) and isinstance(right, Node)) or (source := _source(right, free)) is None:
        return
    numbers = carry(source, numbered(source, -1), right)
    if numbers is None:
        return
    if (contracted := _along(numbers, -2)) is not None:
        query = _source(left, free)
        if query is not None:
            yield from _contracted(left, query, source, contracted)
    elif (passing := _along(numbers, -1)) is not None:
        yield from _passed(matmul, source, passing, free)


def _contracted(left: Node, query: Node, key: Node, keys: Tensor) -> Iterator[Coupling]:
    numbers = carry(query, numbered(query, -1), left)
    queries = None if numbers is None else _along(numbers, -1)
    if queries is None:
        return
    pairs = torch.stack([part.flatten() for part in torch.broadcast_tensors(queries, keys)])
    pairs = pairs[:, (pairs > 0).all(0)].unique(dim=1).long() - 1
    if _one_to_one(pairs):
        yield Coupling(Side(query.name, pairs[0]), Side(key.name, pairs[1]))


def _passed(matmul: Node, source: Node, channels: Tensor, free: set[Node]) -> Iterator[Coupling]:
    readers = list(_readers(matmul))
    if len(readers) != 1:
        return
    ((reader, value),) = readers
    if reader not in free or reader.args[0] is not value:
        return
    numbers = carry(matmul, channels[..., None, :].expand(matmul.meta["val"].shape).contiguous(), value)
    columns = None if numbers is None else _along(numbers.reshape(1, -1, numbers.shape[-1]), -1)
    if columns is None:
        return
    rows = columns.flatten().long() - 1
    pairs = torch.stack([rows, torch.arange(len(rows))])[:, rows >= 0]
    if _one_to_one(pairs):
        yield Coupling(Side(source.name, pairs[0]), Side(reader.name, pairs[1], columns=True))


def _along(numbers: Tensor, axis: int) -> Tensor | None:
    """The channel numbers along one of the last two axes, where the other one changes nothing but zeros; without that other axis."""
    other = -3 - axis
    largest = numbers.amax(other, keepdim=True)
    constant = bool(((numbers == largest) | (numbers == 0)).all())
    return largest.squeeze(other) if constant and numbers.shape[axis] > 1 else None


def _one_to_one(pairs: Tensor) -> bool:
    return pairs.shape[1] > 0 and all(len(side.unique()) == pairs.shape[1] for side in pairs)


def _source(value: Node, free: set[Node]) -> Node | None:
    """The linear that a matmul's operand shows in another shape, times a number."""
    node: Node | None = value
    while node is not None and node not in free:
        passes = node.op == "call_function" and (node.target in BIJECTIVE | PARTIAL or is_factor(node))
        node = optional_argument(node, 0) if passes else None
    return node


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """Who computes with a value, through shape-only ops and factors: (user, the argument by which it reads)."""
    for user in node.users:
        if optional_argument(user, 0) is node and (user.target in BIJECTIVE | PARTIAL or is_factor(user)):
            yield from _readers(user)
        elif reads_values(user, node):
            yield user, node


def _only_here(linear: Node, side: Side) -> bool:
    """Whether each coupled row of a linear reaches one operand of one matmul and nothing else."""
    if side.columns:
        return True
    reached = torch.zeros(linear.meta["val"].shape[-1], dtype=torch.int64)
    for user, value in _readers(linear):
        numbers = carry(linear, numbered(linear, -1), value)
        if numbers is None or user.target not in MATMULS:
            rows = torch.arange(len(reached)) if numbers is None else _channels(numbers)
            reached[rows] += 2
        else:
            reached[_channels(numbers)] += 1
    return bool((reached[side.channels] == 1).all())


def _channels(numbers: Tensor) -> Tensor:
    found = numbers.unique().long()
    return found[found > 0] - 1


def _parameters(linear: Node) -> list[Node]:
    return [node for node in (optional_argument(linear, 1), optional_argument(linear, 2)) if node is not None]


def _size(module: GraphModule, nodes: Mapping[str, Node], side: Side, ranges: Mapping[str, ChannelRange]) -> Tensor:
    """What a side's channels measure, float64 (K,): the largest magnitude of a row's output, or the norm of a column."""
    if side.columns:
        weight = tensor_of(module, _parameters(nodes[side.linear])[0])
        return weight.double().norm(dim=0)[side.channels]
    found = ranges[side.linear]
    return torch.maximum(found.high, -found.low).double()[side.channels]


def _scale(module: GraphModule, nodes: Mapping[str, Node], side: Side, scale: Tensor) -> None:
    for parameter in _parameters(nodes[side.linear]):
        tensor = tensor_of(module, parameter)
        if side.columns and tensor.dim() == 1:
            continue  # the bias belongs to the rows
        factors = torch.ones(tensor.shape[-1 if side.columns else 0], dtype=torch.float64, device=tensor.device)
        factors[side.channels] = scale
        scaled = tensor.double() * (factors if side.columns else factors.reshape(-1, *[1] * (tensor.dim() - 1)))
        assign(module, {str(parameter.target): scaled.to(tensor.dtype)})
