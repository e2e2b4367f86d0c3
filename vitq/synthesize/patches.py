"""Where a captured model's patches can be compared, found in the dataflow: no table of families, no class token assumed.

The places are the products of attention probabilities and values, averaged over heads. Where there is none (attention that stays fused
or has no softmax), the values that enter the model's blocks stand in: tokens (B, N, C) or maps (B, C, H, W).
"""

from dataclasses import dataclass

from torch import Tensor

from vitq.errors import InputError
from vitq.graph import Graph

_FEWEST = 3  # patches that say anything about each other; class attention has one query


@dataclass(frozen=True)
class Place:
    """A node whose value holds patches, and the tokens before them that are none: of a class, registers.

    Its value is attention's (B windows, heads, N, C), or of tokens (B windows, N, C), or a map (B, C, H, W).
    """

    node: str
    prefix: int
    is_map: bool = False

    def patches(self, value: Tensor, images: int) -> Tensor:
        """The patches in the node's value for so many images: (B, windows, N, C)."""
        if self.is_map:
            return value.flatten(2).mT[:, None]
        tokens = value.mean(1) if value.ndim == 4 else value
        return tokens[..., self.prefix :, :].reshape(images, -1, tokens.shape[-2] - self.prefix, tokens.shape[-1])


def places(graph: Graph) -> tuple[Place, ...]:
    """The places of a captured model, in its order.

    Raises:
        InputError: there is none.
    """
    shapes = {node.name: tuple(node.meta["val"].shape) for node in graph.module.graph.nodes if hasattr(node.meta.get("val"), "shape")}
    embedded = [shapes[graph.nodes[layer.name]] for layer in graph.layers if layer.type == "patch_embed"]
    grids = {shape[2] * shape[3] for shape in embedded if len(shape) == 4}

    def prefix(tokens: int) -> int:
        """The tokens beyond the grid of patches; a window has fewer than the grid, and none."""
        return next((tokens - patches for patches in grids if 0 < tokens - patches < patches), 0)

    def streams(*, dimensions: int) -> list[str]:
        """What enters the blocks behind the first, where it is one tensor of so many dimensions."""
        entering = [[name for name in block.inputs if name in shapes] for block in graph.blocks[1:]]
        return list(dict.fromkeys(names[0] for names in entering if len(names) == 1 and len(shapes[names[0]]) == dimensions))

    attention = [graph.nodes[layer.name] for layer in graph.layers if layer.type == "av"]
    tokens = [[Place(name, prefix(shapes[name][-2])) for name in names] for names in (attention, streams(dimensions=3))]
    maps = [Place(name, 0, is_map=True) for name in streams(dimensions=4)]
    for kind in (*tokens, maps):
        if found := [place for place in kind if _count(place, shapes[place.node]) >= _FEWEST]:
            return tuple(found)
    raise InputError("the model has neither attention nor blocks with patches to compare, so no images can be made; give real ones")


def _count(place: Place, shape: tuple[int, ...]) -> int:
    """The patches of a window in a place whose value has this shape."""
    return shape[2] * shape[3] if place.is_map else shape[-2] - place.prefix
