"""What an allocation minimises: one function an objective, each turning a cost table into prices of layers, and of pairs, at their widths.

An allocation minimises the sum of the prices of all layers, fixed ones included, and of all pairs where there are some. A new objective
is one function here and one line of `OBJECTIVES`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from vitq.allocation.choices import Widths
from vitq.artifacts import CostTable, Layer
from vitq.errors import UsageError

Price = Callable[[Layer, int | None, int], float]
"""(layer, weight_bits or None for a matmul, activation_bits) -> cost in the unit of its table."""
PairPrice = Callable[[int, int], float]
"""(width of the first layer, width of the second) -> cost beyond both layers' own."""

GAMMA = 4.0
"""By how much one bit more divides an error: a uniform quantizer's step halves, so its squared error falls to a quarter."""


@dataclass(frozen=True)
class Objective:
    """The price of each layer, and of pairs of layers by their names (tied widths only)."""

    price: Price
    pairs: Mapping[tuple[str, str], PairPrice] = field(default_factory=dict)

    def total(self, widths: Iterable[Widths]) -> float:
        """The cost of a plan; its rounding does not depend on any order."""
        entries = list(widths)
        bits = {entry.layer.name: entry.activation_bits for entry in entries}
        between = [price(bits[first], bits[second]) for (first, second), price in self.pairs.items()]
        return math.fsum([self.price(*entry) for entry in entries] + between)


def sum_of_costs(table: CostTable, bits_apart: bool, gamma: float) -> Objective:
    """The table's own costs: `tied` for equal widths, else `weight` + `activation` + `cross`.

    With `bits_apart` equal widths too are priced as weight + activation + cross, so that all pairs of a layer are comparable. A width
    between or above those of the table gets the cost of the next narrower one that was priced, which is never too low.
    """

    def price(layer: Layer, weight_bits: int | None, activation_bits: int) -> float:
        column = _column(table, activation_bits, layer.name)
        if weight_bits is None:
            return table.activation[layer.name][column] if bits_apart else table.tied[layer.name][column]
        if weight_bits == activation_bits and not bits_apart:
            return table.tied[layer.name][column]
        row = _column(table, weight_bits, layer.name)
        crossed = table.cross[layer.name][row][column] if layer.name in table.cross else 0.0
        return table.weight[layer.name][row] + table.activation[layer.name][column] + crossed

    return Objective(price)


def decay(table: CostTable, bits_apart: bool, gamma: float) -> Objective:
    """LampQ's: Omega * gamma^-b, with Omega the layer's importance (arXiv 2511.10004, the integer program of its initial assignment).

    Where weight and activation differ in bits it is Omega * (gamma^-w + gamma^-a) / 2, which is the same where they agree. The paper does
    not say how it couples the two at 4/8; this sum amounts to one allocation for the weights and one for the activations with one Omega.

    Differs from the paper: it does not give gamma; 4 unless asked otherwise (`GAMMA`).
    """
    if not table.importance:
        raise UsageError(
            "objective gamma needs one importance a layer, which this metric does not give; choose another with --metric, such as one of "
            "`vitq profile --metric lampq` or `--metric lrp`, or --objective sum"
        )

    def price(layer: Layer, weight_bits: int | None, activation_bits: int) -> float:
        weight = activation_bits if weight_bits is None else weight_bits
        return table.importance[layer.name] * (gamma**-weight + gamma**-activation_bits) / 2

    return Objective(price)


def separable(table: CostTable, bits_apart: bool, gamma: float) -> Objective:
    """Mix-QViT's integer quadratic program (arXiv 2501.06357): sum_{l,b} C^w_{l,b} x_{l,b} + C^a_{l,b} y_{l,b}, `cross` left out.

    What is quadratic in it is the budget on BitOps, sum_l M_l (sum_b b x_{l,b}) (sum_b b y_{l,b}) with weights x and activations y apart.
    No product is left to linearise: with `bits_apart` an option of the choice tree is a (weight, activation) pair, in effect the product
    z_{l,b,b'} = x_{l,b} y_{l,b'} itself, and its BitOps M_l b b' are a number. With tied widths the costs are the table's `tied`.
    """
    return sum_of_costs(table.model_copy(update={"cross": {}}), bits_apart, gamma)


def pairwise(table: CostTable, bits_apart: bool, gamma: float) -> Objective:
    """CLADO's (arXiv 2307.05657): x^T G x over all (layer, width), with `tied` on the diagonal and half of `pairs` on both sides of it.

    G is measured and so need not be positive semidefinite, which a matrix of second-order terms is; its negative eigenvalues are set to 0.
    That changes the layers' own costs too, and can put small terms between layers that have none in the table.

    Raises:
        UsageError: a table without pairs, or weights and activations apart, for which there are none.
    """
    if not table.pairs:
        raise UsageError(
            "objective pairwise needs terms between layers, which this metric does not give; choose another --metric or --objective sum"
        )
    if bits_apart:
        raise UsageError("objective pairwise is for tied widths, the only ones with terms between layers; leave out --bits-apart")
    names, count = sorted(table.tied), len(table.bits)
    start = {name: position * count for position, name in enumerate(names)}
    matrix = np.diag([cost for name in names for cost in table.tied[name]])
    for pair in sorted(table.pairs, key=lambda pair: (pair.first, pair.second)):
        rows, columns = (slice(start[name], start[name] + count) for name in (pair.first, pair.second))
        matrix[rows, columns] += np.array(pair.costs) / 2
        matrix[columns, rows] += np.array(pair.costs).T / 2
    repaired = positive_semidefinite(matrix)

    def price(layer: Layer, weight_bits: int | None, activation_bits: int) -> float:
        at = start[layer.name] + _column(table, activation_bits, layer.name)
        at_weight = at if weight_bits is None else start[layer.name] + _column(table, weight_bits, layer.name)
        return float(repaired[at, at] + repaired[at_weight, at_weight]) / 2

    def between(first: str, second: str) -> PairPrice:
        def pair_price(first_bits: int, second_bits: int) -> float:
            at = start[first] + _column(table, first_bits, first), start[second] + _column(table, second_bits, second)
            return float(2 * repaired[at])

        return pair_price

    negligible = 1e-12 * np.abs(repaired).max(initial=0.0)
    pairs = {}
    for position, first in enumerate(names):
        for second in names[position + 1 :]:
            part = repaired[start[first] : start[first] + count, start[second] : start[second] + count]
            if np.abs(part).max() > negligible:
                pairs[first, second] = between(first, second)
    return Objective(price, pairs)


def positive_semidefinite(matrix: np.ndarray) -> np.ndarray:
    """The nearest positive semidefinite matrix (n, n): negative eigenvalues set to 0; the same matrix where there is none."""
    values, vectors = np.linalg.eigh(matrix)
    if values.min(initial=0.0) >= -1e-12 * np.abs(values).max(initial=0.0):
        return matrix
    clipped = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return (clipped + clipped.T) / 2


OBJECTIVES: dict[str, Callable[[CostTable, bool, float], Objective]] = {
    "sum": sum_of_costs,
    "gamma": decay,
    "mix-qvit": separable,
    "pairwise": pairwise,
}
"""By name: (cost table, whether weights and activations have bits of their own, gamma of the objective `gamma`) -> what to minimise."""


def _column(table: CostTable, width: int, layer: str) -> int:
    narrower = [column for column, bits in enumerate(table.bits) if bits <= width]
    if not narrower:
        raise UsageError(
            f"layer {layer!r} at {width} bits has no cost: the profile starts at {table.bits[0]} bits; "
            f"choose a wider one or run `vitq profile` again with {width} in --bits"
        )
    return narrower[-1]
