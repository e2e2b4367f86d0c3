"""Where a captured model's patches can be compared, found in the dataflow: no table of families, no class token assumed.

The places are the products of attention probabilities and values, averaged over heads. Where there is none (attention that stays fused
or has no softmax), the values that enter the model's blocks stand in: tokens (B, N, C) or maps (B, C, H, W).
"""

from dataclasses import dataclass

from torch import Tensor

from vitq.errors import InputError
from vitq.graph import Graph

_FEWEST = 3  # patches that say anything about each other; class attention has one query
_MOST_BEFORE = 9  # a class token and eight registers


@dataclass(frozen=True)
class Place:
    """A node whose value holds patches, and the tokens before them that are none: of a class, registers.

    Its value is attention's (B windows, heads, N, C), or of tokens (B windows, N, C), or, channels first, attention's between
    channels (B, heads, C, N) or a map (B, C, H, W).
    """

    node: str
    prefix: int = 0
    channels_first: bool = False
    is_map: bool = False

    def patches(self, value: Tensor, images: int) -> Tensor:
        """The patches in the node's value for so many images: (B, windows, N, C)."""
        tokens = value.flatten(2) if self.is_map else value.mean(1) if value.ndim == 4 else value
        tokens = tokens.mT if self.channels_first else tokens
        return tokens[..., self.prefix :, :].reshape(images, -1, tokens.shape[-2] - self.prefix, tokens.shape[-1])


def places(graph: Graph) -> tuple[Place, ...]:
    """The places of a captured model, in its order.

    Raises:
        InputError: there is none.
    """
    shapes = {node.name: tuple(node.meta["val"].shape) for node in graph.module.graph.nodes if hasattr(node.meta.get("val"), "shape")}
    made = [shapes[graph.nodes[layer.name]] for layer in graph.layers if layer.op == "convolution"]
    grids = {shape[2] * shape[3] for shape in made if len(shape) == 4}

    def place(name: str) -> Place:
        """Of attention or tokens: what a few tokens more than a grid say, and as many channels where the tokens are no grid."""
        windows, *_, tokens, channels = shapes[name]
        prefix = next((tokens - grid for grid in grids if 0 < tokens - grid <= min(_MOST_BEFORE, grid)), 0)
        between_channels = windows == 1 and not prefix and tokens not in grids and channels in grids
        return Place(name, prefix, channels_first=between_channels)

    def streams(dimensions: int) -> list[str]:
        """What enters the blocks behind the first, where it is one tensor of so many dimensions."""
        entering = [[name for name in block.inputs if name in shapes] for block in graph.blocks[1:]]
        return list(dict.fromkeys(names[0] for names in entering if len(names) == 1 and len(shapes[names[0]]) == dimensions))

    attention = [place(graph.nodes[layer.name]) for layer in graph.layers if layer.type == "av"]
    tokens = [place(name) for name in streams(3)]
    maps = [Place(name, channels_first=True, is_map=True) for name in streams(4)]
    for kind in (attention, tokens, maps):
        if found := [place for place in kind if _count(place, shapes[place.node]) >= _FEWEST]:
            return tuple(found)
    raise InputError("the model has neither attention nor blocks with patches to compare, so no images can be made; give real ones")


def _count(place: Place, shape: tuple[int, ...]) -> int:
    """The patches of a window in a place whose value has this shape."""
    return shape[2] * shape[3] if place.is_map else shape[-1 if place.channels_first else -2] - place.prefix
