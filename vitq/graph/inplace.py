"""Replaces ops that write into their argument (relu_, add_) by those that return a new value.

What is intercepted, cached or differentiated in a graph must not change under one's hands: the gradient at a convolution's output is
wrong once the ReLU after it has written there. An op stays as it is where the values that share its argument's memory are read
again later, so that the write is meant to be seen through them (filling slices of a buffer).
"""

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from vitq.graph.dataflow import BIJECTIVE, PARTIAL, aten, optional_argument, walk_back

_MAY_SHARE_MEMORY = BIJECTIVE | PARTIAL


def without_inplace_ops(module: GraphModule) -> None:
    """Edits the module's graph; whoever read the overwritten value afterwards reads the new one."""
    nodes = list(module.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        plain = _plain_op(node)
        value = optional_argument(node, 0)
        if plain is None or value is None or _is_seen_elsewhere(value, position[node], position):
            continue
        node.target = plain
        value.replace_all_uses_with(node, delete_user_cb=lambda user, after=position[node]: position[user] > after)


def _plain_op(node: Node) -> OpOverload | None:
    """The op that computes the same without writing: `aten.add.Tensor` for `aten.add_.Tensor`."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return None
    packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
    plain = getattr(getattr(aten, packet.removesuffix("_"), None), overload, None)
    if not packet.endswith("_") or not isinstance(plain, OpOverload):
        return None
    given, wanted = (tuple(argument.name for argument in op._schema.arguments) for op in (node.target, plain))
    return plain if given == wanted else None


def _is_seen_elsewhere(value: Node, after: int, position: dict[Node, int]) -> bool:
    """Whether another value that may share this one's memory is read after position `after`."""
    pending, sharing = [walk_back(value, _MAY_SHARE_MEMORY)], set()
    while pending:
        current = pending.pop()
        sharing.add(current)
        pending += [user for user in current.users if user.target in _MAY_SHARE_MEMORY and user not in sharing]
    return any(position[user] > after for other in sharing - {value} for user in other.users)
