"""Small maps of a network for the terminal, a row a block, a column a type: the bits of a plan, or what each layer costs.

In a pipe the same characters without colour. Left out where a network has too many types for the width; `vitq show` lists every layer.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts import BitPlan, Layer, LayerBits, Profile

_COLOURS = {2: "bold red", 3: "red", 4: "yellow", 5: "green", 6: "cyan", 7: "blue", 8: "bold blue"}
_USUAL = 4
"""The width at which layers' costs are shown: where most are chosen."""


def plan_map(plan: "BitPlan", layers: "Iterable[Layer]") -> "list[Table]":
    """The bits of every layer: one number where weight and input have the same, `weight/input` where not, a matmul's alone."""
    bits = plan.bits
    shown = {layer.name: _bits(bits[layer.name]) for layer in layers}
    return _map("bits", layers, shown)


def cost_map(profile: "Profile", metric: str) -> "list[Table]":
    """Each layer's part of what all layers cost at 4 bits, in percent; a dot is less than half a percent."""
    table = profile.costs[metric]
    width = min(table.bits, key=lambda bits: (abs(bits - _USUAL), bits))
    costs = {name: max(0.0, found[table.bits.index(width)]) for name, found in table.tied.items()}
    whole = math.fsum(costs.values())
    if not whole:
        return []
    return _map(f"% of the cost at {width} bits", profile.layers, {name: _share(100 * cost / whole) for name, cost in costs.items()})


def _map(title: str, layers: "Iterable[Layer]", shown: Mapping[str, tuple[str, str]]) -> "list[Table]":
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vitq import grid

    where = {layer.name: grid.Place(layer.block, layer.type) for layer in layers}
    laid = grid.lay_out(where, {name: f"[{style}]{text}[/]" if style else text for name, (text, style) in shown.items()})
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True)
    for column in laid.columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for line in laid.lines:
        others = "  ".join(f"{cell.type} {cell.shown}" for cell in line.others)
        table.add_row(escape(line.block), *(" ".join(cell.shown for cell in cells) for cells in line.columns), others)
    console = Console()
    return [table] if console.measure(table).minimum <= console.width else []


def _bits(entry: "LayerBits") -> tuple[str, str]:
    weight, activation = entry.weight_bits, entry.activation_bits
    if weight in (None, activation):
        return str(activation), _COLOURS[activation]
    return f"{weight}/{activation}", _COLOURS[min(weight, activation)]


def _share(percent: float) -> tuple[str, str]:
    if percent < 0.5:
        return ".", ""
    return f"{percent:.0f}", "bold red" if percent >= 10 else "red" if percent >= 5 else "yellow" if percent >= 2 else ""
