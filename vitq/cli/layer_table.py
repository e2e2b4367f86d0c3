"""Layers as rows, for JSON, and as a table that fits 80 columns, for people: a line a layer under a line a block."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vitq.units import in_decimals, in_units

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts import BitPlan, Layer, LayerBits, Profile

Row = dict[str, Any]
"""What is known of one layer: name and, where known, type, block, op, parameters, macs, operands, weight_bits, activation_bits."""

_WIDE = 100
"""Columns from which on a terminal has room for all that is known of a calibrated layer."""

_SHORT: dict[str, str] = {"post_layernorm": "layernorm", "post_softmax": "softmax", "post_gelu": "gelu"}


def layer_rows(layers: "Iterable[Layer]", bits: "Mapping[str, LayerBits] | None" = None) -> list[Row]:
    """A row a layer, with the widths that a plan gives it."""
    rows = []
    for layer in layers:
        entry = bits.get(layer.name) if bits else None
        rows.append(layer.model_dump(mode="json") | (entry.model_dump(include={"weight_bits", "activation_bits"}) if entry else {}))
    return rows


def worst(errors: Mapping[str, Mapping[str, Any]], count: int = 3) -> str:
    """The layers that cost most, with their parts of all layers' KL, in words."""
    whole = sum(error["kl"] for error in errors.values()) or 1.0
    first = sorted(errors, key=lambda name: (-errors[name]["kl"], name))[:count]
    return ", ".join(f"{name} {100 * errors[name]['kl'] / whole:.0f} %" for name in first)


def plan_table(plan: "BitPlan", layers: "Iterable[Layer]") -> "Table":
    """The plan of a model whose layers are known."""
    return layer_table(layer_rows(layers, plan.bits))


def layer_table(rows: Sequence[Row]) -> "Table":
    """The rows as a table, with the columns that are known of some of them, as far as they fit."""
    from rich.console import Console

    known = {key for row in rows for key in row}
    columns = [("type", "type", "left"), ("parameters", "weights", "right"), ("macs", "MACs", "right"), ("operands", "reads", "left")]
    columns = [column for column in columns if column[0] in known]
    if "kl" in known:  # in 80 columns, what a calibrated layer costs says more than how large it is
        errors = [("sqnr", "SQNR dB", "right"), ("kl", "KL", "right")]
        columns = [*(columns if Console().width >= _WIDE else columns[:1]), *errors]
    with_bits = "activation_bits" in known
    table = _table("layer", [(title, justify) for _, title, justify in columns] + [("bits", "left")] * with_bits)
    block = None
    for row in rows:
        if row.get("block", block) != block:
            block = row["block"]
            table.add_row(f"[bold]{_plain(block) or '(no block)'}[/bold]")
        cells = [_cell(key, row.get(key)) for key, _, _ in columns]
        table.add_row(" " + _plain(row["name"]), *cells, *[_bits(row)] * with_bits)
    return table


def cost_table(profile: "Profile", metric: str) -> "Table":
    """What each layer costs at each width, weights and activations together."""
    costs = profile.costs[metric]
    table = _table(f"{metric}, {costs.unit}", [(f"{width} bits", "right") for width in costs.bits])
    for layer in profile.layers:
        table.add_row(_plain(layer.name), *(f"{cost:.0e}" for cost in costs.tied[layer.name]))
    return table


def plain_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> "Table":
    """Text to the left, which may wrap, and numbers to the right, which may not."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in titles:
        table.add_column(title, justify="left" if title == titles[0] else "right", no_wrap=title != titles[0], overflow="fold")
    for row in rows:
        table.add_row(_plain(row[0]), *row[1:])
    return table


def _table(first: str, others: Sequence[tuple[str, Any]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for title, justify in others:
        table.add_column(title, justify=justify, no_wrap=True)
    return table


def _cell(key: str, value: Any) -> str:
    if value is None or (key == "parameters" and not value):
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if key == "sqnr" else in_decimals(value)
    if key == "operands":
        roles = [str(operand["role"]) for operand in value if operand["role"] != "weight"]
        return " x ".join(_SHORT.get(role, role) for role in roles)
    return in_units(value, "").replace(" ", "") if isinstance(value, int) else _plain(value)


def _bits(row: Row) -> str:
    weight, activation = row.get("weight_bits"), row.get("activation_bits")
    return f"{'-' if weight is None else weight}/{'-' if activation is None else activation}"


def _plain(text: str) -> str:
    """Text that rich takes as it is."""
    from rich.markup import escape

    return escape(text)
