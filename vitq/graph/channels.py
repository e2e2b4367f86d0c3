"""Proves where channels go in a chain of shape-only ops, by running the chain on the channels' own numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vitq.graph.dataflow import aten, op_of, optional_argument


def reaches_in_order(source: Node, source_axis: int, target: Node, target_axis: int) -> bool:
    """Whether the channels along `source_axis` of `source` arrive in order, all of them, along `target_axis` of `target`."""
    in_order, padded = arrives(source, source_axis, target, target_axis)
    return in_order and not padded


def arrives(source: Node, source_axis: int, target: Node, target_axis: int) -> tuple[bool, bool]:
    """Whether the channels arrive in order, all of them, and whether padding zeros arrive among them."""
    arrived = carry(source, numbered(source, source_axis), target)
    if arrived is None:
        return False, False
    rows = arrived.movedim(target_axis, -1)
    expected = torch.arange(1, source.meta["val"].shape[source_axis] + 1, dtype=rows.dtype)
    in_order = rows.shape[-1] == len(expected) and bool(((rows == expected) | (rows == 0)).all())
    return in_order, in_order and bool((arrived == 0).any())


def numbered(source: Node, axis: int) -> Tensor:
    """A value of the source's shape whose elements are the numbers of their channels along an axis, counted from 1."""
    shape = source.meta["val"].shape
    numbers = torch.arange(1, shape[axis] + 1, dtype=torch.float32)
    return numbers.reshape([-1 if at == axis % len(shape) else 1 for at in range(len(shape))]).expand(shape).contiguous()


def is_factor(node: Node) -> bool:
    """Whether a node multiplies or divides a value by a single number."""
    return node.target in (aten.mul.Tensor, aten.div.Tensor) and len(node.args) == 2 and isinstance(node.args[1], int | float)


def carry(source: Node, numbers: Tensor, target: Node) -> Tensor | None:
    """What `target` holds if `source` holds `numbers`; None where no chain of first arguments leads from one to the other.

    The ops between must be shape-only, or factors, which are passed over; nodes carry one image's shapes in `meta["val"]`.
    """
    chain = [target]
    while chain[-1] is not source:
        previous = optional_argument(chain[-1], 0)
        if previous is None or chain[-1].op != "call_function":
            return None
        chain.append(previous)
    value = numbers
    for node in reversed(chain[:-1]):
        if is_factor(node):
            continue
        known = {optional_argument(node, 0): value}

        def value_of(argument: Node, known: dict[Node | None, Any] = known) -> Any:
            return known[argument] if argument in known else argument.meta["val"]

        value = op_of(node)(*map_arg(node.args, value_of), **map_arg(node.kwargs, value_of))
    return value
