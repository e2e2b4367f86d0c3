"""What an allocation minimises: one function an objective, each turning a cost table into the price of a layer at its widths.

An allocation minimises the sum of the prices of all layers, fixed ones included. A new objective is one function here and one line
of `OBJECTIVES`. Left out: terms between two layers.
"""

from collections.abc import Callable

from vitq.artifacts import CostTable, Layer
from vitq.errors import UsageError

Price = Callable[[Layer, int | None, int], float]
"""(layer, weight_bits or None for a matmul, activation_bits) -> cost in the unit of its table."""


def sum_of_costs(table: CostTable, bits_apart: bool) -> Price:
    """The table's own costs: `tied` for equal widths, else `weight` + `activation` + `cross`.

    With `bits_apart` equal widths too are priced as weight + activation + cross, so that all pairs of a layer are comparable. A width
    between or above those of the table gets the cost of the next narrower one that was priced, which is never too low.
    """

    def price(layer: Layer, weight_bits: int | None, activation_bits: int) -> float:
        column = _column(table, activation_bits, layer)
        if weight_bits is None:
            return table.activation[layer.name][column] if bits_apart else table.tied[layer.name][column]
        if weight_bits == activation_bits and not bits_apart:
            return table.tied[layer.name][column]
        row = _column(table, weight_bits, layer)
        crossed = table.cross[layer.name][row][column] if layer.name in table.cross else 0.0
        return table.weight[layer.name][row] + table.activation[layer.name][column] + crossed

    return price


OBJECTIVES: dict[str, Callable[[CostTable, bool], Price]] = {"sum": sum_of_costs}


def _column(table: CostTable, width: int, layer: Layer) -> int:
    narrower = [column for column, bits in enumerate(table.bits) if bits <= width]
    if not narrower:
        raise UsageError(
            f"layer {layer.name!r} at {width} bits has no cost: the profile starts at {table.bits[0]} bits; "
            f"choose a wider one or run `vitq profile` again with {width} in --bits"
        )
    return narrower[-1]
