"""Which values of a captured graph are the same numbers in another shape, and where a value comes from.

A *shape-only* op moves numbers without computing. A *bijective* one keeps all of them (reshape, permute, roll), the others take a
part or add zeros (slice, unbind, pad). Layers read their operands through such ops; roles and shared tensors are found by walking
back over them.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten

BIJECTIVE = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int, aten.t.default,
    aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.roll.default, aten.flip.default,
    aten.movedim.int, aten.movedim.intlist, aten.swapaxes.default, aten.swapdims.default, aten.numpy_T.default, aten.mT.default,
    aten.dropout.default, aten.view_as.default, aten.reshape_as.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
}  # fmt: skip

PARTIAL = {
    aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes,
    aten.chunk.default, aten.narrow.default, aten.expand.default, aten.expand_as.default, aten.repeat.default, aten.tile.default,
    aten.constant_pad_nd.default, aten.pad.default, aten.index_select.default, aten.unfold.default, aten.im2col.default,
    aten.broadcast_to.default, aten.tensor_split.sections, operator.getitem,
}  # fmt: skip

MATMULS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
CONVOLUTIONS = {
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.conv3d.padding,
}  # fmt: skip
SOFTMAXES = {aten.softmax.int, aten._softmax.default}
NORMS = {aten.layer_norm.default, aten.rms_norm.default}
GELUS = {aten.gelu.default}
ACTIVATIONS = GELUS | {
    aten.relu.default, aten.relu_.default, aten.silu.default, aten.silu_.default, aten.hardswish.default, aten.hardswish_.default,
    aten.sigmoid.default, aten.quick_gelu.default if hasattr(aten, "quick_gelu") else aten.gelu.default, aten.hardtanh.default,
    aten.relu6.default, aten.leaky_relu.default, aten.elu.default, aten.mish.default,
}  # fmt: skip

_TAKES_SHAPE = {aten.view_as.default, aten.reshape_as.default, aten.expand_as.default}  # of their second argument
_READS_SHAPE = _TAKES_SHAPE | {aten.sym_size.int}


def walk_back(node: Node, through: set) -> Node:
    """The value that `node` shows in another shape: the first producer that is not one of the ops `through`."""
    while node.op == "call_function" and node.target in through and (source := optional_argument(node, 0)) is not None:
        node = source
    return node


def consumers(node: Node, through: set) -> Iterator[tuple[Node, Node]]:
    """Every user that computes with `node`, followed through the ops `through`: (user, the argument by which it reads the value).

    A user that only asks for the shape computes nothing with it and is left out.
    """
    for user in node.users:
        if user.op == "call_function" and user.target in through and optional_argument(user, 0) is node:
            yield from consumers(user, through)
        elif reads_values(user, node):
            yield user, node


def reads_values(user: Node, node: Node) -> bool:
    """Whether a user of a value computes with it, and does not only ask for its shape."""
    return user.target not in _READS_SHAPE or (user.target in _TAKES_SHAPE and optional_argument(user, 0) is node)


def argument(node: Node, index: int) -> Node:
    """The value that an op reads as its argument `index`."""
    value = optional_argument(node, index)
    assert value is not None, f"{node.format_node()} has no value as argument {index}"
    return value


def optional_argument(node: Node, index: int) -> Node | None:
    """The value that an op reads as its argument `index`; None where there is none or a number stands there."""
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, Node) else None


def op_of(node: Node) -> Callable[..., Any]:
    """The function that a node calls."""
    assert callable(node.target)
    return node.target


def tensor_of(module: GraphModule, node: Node) -> Tensor:
    """The parameter, buffer or constant that a get_attr node reads."""
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value


def assign(module: GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors at dotted names, as parameters where they are floating point, making the names that are new."""
    for target, value in tensors.items():
        *path, name = target.split(".")
        owner: nn.Module = module
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if hasattr(owner, name):
            delattr(owner, name)
        if value.is_floating_point():
            setattr(owner, name, nn.Parameter(value.detach(), requires_grad=False))
        else:
            owner.register_buffer(name, value)


def module_path(node: Node) -> str:
    """The path of the module whose forward made this op, as timm names it; "" for the model's own forward."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [path for path, _ in stack.values()]
    return _plain_path(entries[-1]) if entries else ""


def _plain_path(path: str) -> str:
    # torch.export marks a module that is called several times as `name@1`, and one without metadata by a hook's name.
    return "" if path.startswith("_empty_nn_module_stack") else path.split("@")[0]
