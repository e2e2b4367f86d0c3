"""Proves that a channel axis survives a chain of shape-only ops, by running the chain on the channels' own numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vitq.graph.dataflow import op_of, optional_argument


def reaches_in_order(source: Node, source_axis: int, target: Node, target_axis: int) -> bool:
    """Whether the channels along `source_axis` of `source` arrive in order, all of them, along `target_axis` of `target`."""
    in_order, padded = arrives(source, source_axis, target, target_axis)
    return in_order and not padded


def arrives(source: Node, source_axis: int, target: Node, target_axis: int) -> tuple[bool, bool]:
    """Whether the channels arrive in order, all of them, and whether padding zeros arrive among them."""
    arrived = probe(source, source_axis, target)
    if arrived is None:
        return False, False
    rows = arrived.movedim(target_axis, -1)
    expected = torch.arange(1, source.meta["val"].shape[source_axis] + 1, dtype=rows.dtype)
    in_order = rows.shape[-1] == len(expected) and bool(((rows == expected) | (rows == 0)).all())
    return in_order, in_order and bool((arrived == 0).any())


def probe(source: Node, source_axis: int, target: Node) -> Tensor | None:
    """What `target` holds if each element of `source` is the number of its channel, counted from 1; None off a chain.

    The ops between must be shape-only; nodes carry one image's shapes in `meta["val"]`.
    """
    chain = [target]
    while chain[-1] is not source:
        previous = optional_argument(chain[-1], 0)
        if previous is None or chain[-1].op != "call_function":
            return None
        chain.append(previous)
    shape = source.meta["val"].shape
    numbers = torch.arange(1, shape[source_axis] + 1, dtype=torch.float32)
    value = numbers.reshape([-1 if axis == source_axis % len(shape) else 1 for axis in range(len(shape))]).expand(shape).contiguous()
    for node in reversed(chain[:-1]):
        known = {optional_argument(node, 0): value}

        def value_of(argument: Node, known: dict[Node | None, Any] = known) -> Any:
            return known[argument] if argument in known else argument.meta["val"]

        value = op_of(node)(*map_arg(node.args, value_of), **map_arg(node.kwargs, value_of))
    return value
