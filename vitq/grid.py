"""Layers laid out as the network is: a row a block, a column a type.

Types that one block alone has, such as the patch embedding and the head, would make columns with one entry each; they go without.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vitq.artifacts import BitPlan, Profile


class Place(NamedTuple):
    """Where a layer stands."""

    block: str
    type: str


@dataclass(frozen=True)
class Cell:
    """One layer and what is shown of it."""

    layer: str
    type: str
    shown: Any


@dataclass(frozen=True)
class Line:
    """One block: a tuple of cells a column, and the cells of no column."""

    block: str
    columns: tuple[tuple[Cell, ...], ...]
    others: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """The blocks from the image to the answer, and the types of their columns."""

    columns: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def with_others(self) -> bool:
        """Whether any block has layers of a column and others of none, which then need one more."""
        return any(line.others and any(line.columns) for line in self.lines)


def places(profile: Profile | None, plan: BitPlan | None) -> dict[str, Place]:
    """Where each layer stands, by name in the order of the network; without a profile, by the names alone."""
    if profile is not None:
        return {layer.name: Place(layer.block, layer.type) for layer in profile.layers}
    return {entry.name: Place(_block_by_name(entry.name), entry.type) for entry in plan.layers} if plan else {}


def lay_out(where: Mapping[str, Place], shown: Mapping[str, Any]) -> Grid:
    """What is shown of each layer, by name, in its place; a layer of no known place is left out."""
    found: dict[str, list[Cell]] = {}
    for name, place in where.items():
        if name in shown:
            found.setdefault(place.block, []).append(Cell(name, place.type, shown[name]))
    columns = _columns(list(found.values()))
    lines = [
        Line(
            block,
            tuple(tuple(cell for cell in cells if cell.type == column) for column in columns),
            tuple(cell for cell in cells if cell.type not in columns),
        )
        for block, cells in found.items()
    ]
    return Grid(columns, tuple(lines))


def _columns(blocks: Sequence[Sequence[Cell]]) -> tuple[str, ...]:
    """The types of several blocks, in order of appearance; of a model where no type comes again, all types."""
    types = [kind for cells in blocks for kind in dict.fromkeys(cell.type for cell in cells)]
    several = tuple(kind for kind in dict.fromkeys(types) if types.count(kind) > 1)
    return several or tuple(dict.fromkeys(types))


def _block_by_name(name: str) -> str:
    """blocks.3.mlp.fc1 -> blocks.3: the name up to its last number."""
    numbered = re.match(r"(.*\.\d+)\.", name)
    return numbered.group(1) if numbered else ""
