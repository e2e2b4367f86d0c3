"""Cuts a captured graph into blocks: the stretches between positions where few values are alive.

A position of the graph is a *cut* if the values computed before it and still needed after it are few (usually the residual stream
alone; two where a class stream or a shared bias travels along). Neighbouring stretches that belong to the same repeated module
(`blocks.3`, `layers.1.blocks.0`) are merged into one block. Running from a cached point rests on cuts.
"""

from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import Tensor
from torch.fx import GraphModule, Node

from vitq.graph.dataflow import module_path


@dataclass(frozen=True)
class Block:
    """One block: its name, its first node, and the values alive where it starts (names of nodes)."""

    name: str
    first: str
    inputs: tuple[str, ...]


def find_blocks(module: GraphModule) -> tuple[tuple[Block, ...], dict[str, str]]:
    """The blocks in order, and the name of the block of each computing node, by node name."""
    nodes = computing_nodes(module)
    alive = _alive_before(nodes)
    cuts = _cuts(nodes, alive)
    stretches = [nodes[start:stop] for start, stop in pairwise([*cuts, len(nodes)])]
    blocks: list[Block] = []
    block_of: dict[str, str] = {}
    for path, group in groupby(stretches, key=_repeated_path):
        members = [node for stretch in group for node in stretch]
        name = _unique(path or "stem" if not blocks else path or "end", {block.name for block in blocks})
        start = nodes.index(members[0])
        blocks.append(Block(name, members[0].name, tuple(sorted(node.name for node in alive[start]))))
        block_of |= dict.fromkeys((node.name for node in members), name)
    return tuple(blocks), block_of


def computing_nodes(module: GraphModule) -> list[Node]:
    """The nodes that compute something from the input, in order: neither parameters nor the input itself nor the output."""
    return [node for node in module.graph.nodes if node.op not in ("get_attr", "placeholder", "output")]


def _alive_before(nodes: list[Node]) -> list[set[Node]]:
    """For each node, the values (the input included) made before it and used by it or later."""
    position = {node: index for index, node in enumerate(nodes)}
    alive: list[set[Node]] = [set() for _ in nodes]
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source.op != "get_attr")
    for source in sources:
        last = max(position.get(user, len(nodes) - 1) for user in source.users)
        for index in range(position.get(source, -1) + 1, last + 1):
            alive[index].add(source)
    return alive


def _cuts(nodes: list[Node], alive: list[set[Node]]) -> list[int]:
    """Positions where as few tensors are alive as the network's own stream needs.

    That number is 1 for most; where it never falls that low for most of the way (two streams, a class token apart), the smallest
    number that yields a cut in every repeated module.
    """
    tensors = [sum(isinstance(node.meta.get("val"), Tensor) for node in before) for before in alive]
    repeated = {path for node in nodes if (path := _repeated_path([node]))}
    for allowed in range(1, 6):
        cuts = [index for index, count in enumerate(tensors) if count <= allowed]
        starts = {_repeated_path([nodes[index]]) for index in cuts}
        if len(starts & repeated) >= len(repeated) / 2:
            break
    return cuts if cuts and cuts[0] == 0 else [0, *cuts]


def _repeated_path(stretch: list[Node]) -> str:
    """The innermost numbered module that holds all nodes of the stretch: `blocks.3` of `blocks.3.attn.qkv` and `blocks.3`."""
    paths = [path.split(".") for node in stretch if (path := module_path(node))]
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    while common and not common[-1].isdigit():
        common.pop()
    return ".".join(common)


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}.{count}"
    return candidate
