"""The cheapest plan where pairs of choices cost something together: the products of options linearised exactly, then branch and cut.

For choices f and g with options a and b, z_ab stands for x_a x_b:  sum_b z_ab = x_a,  sum_a z_ab = x_b,  z >= 0.  With whole x there is
one such z, and it is the product (z_ab >= x_a + x_b - 1 follows, and the relaxation is tighter than with that alone). No sign and no
convexity of the pairs' costs is asked for. First, what a pair costs at least, whatever the other one's option, moves to the options' own
costs; so all that is left is at least 0.

The search starts from a plan that is cheap by a tangent of the form (convex.py) and that no change of two choices improves (swaps.py).
The program has as many products as the pairs have pairs of options: seconds for 74 layers, all coupled, at three widths. With more than
`PRODUCTS`, HiGHS would need minutes for the relaxation alone: the start is then the answer, and the certificate gives its gap to the
convex form's bound, a weak one. Left out: terms of three layers, choices that hang under an option.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy.sparse

from vitq.allocation.choices import ChoiceTree
from vitq.allocation.convex import tangent
from vitq.allocation.highs import Program, relax, search
from vitq.allocation.solver import RESOLUTION, SCALE, WORK, Row, Solution, meets, reduce, solve, tighten
from vitq.allocation.swaps import swap

Products = Mapping[tuple[int, int], np.ndarray]
"""(position of a choice, of another one) -> what their options cost together: a row an option of the first, a column one of the second."""

PRODUCTS = 25_000
"""Beyond so many products of options no search is begun unless a gap is asked for."""


def solve_with_products(
    tree: ChoiceTree, costs: Sequence[float], products: Products, rows: Sequence[Row], gap: float | None = None
) -> Solution | None:
    """As `solve`, with the products added to the cost of a plan; the tree has no choice under an option."""
    start = time.perf_counter()
    own, rest = _separate(tree, np.array(costs, float), products)
    tight = [tighten(tree, row) for row in rows]
    held = [row for row, _ in tight if row is not None]
    started = _start(tree, np.array(costs, float), products, held)
    if started is None:
        return None
    taken, bound = started
    reduced = reduce(tree, own.tolist())[0]
    below, exhausted, prices = 0.0, True, [0.0] * len(held)
    value = _value(tree, reduced, rest, taken)
    if value > 0 and gap is None and sum(together.size for together in rest.values()) > PRODUCTS:
        below, exhausted = _value(tree, costs, products, taken) - bound, False
    elif value > 0:
        program, units = _program(tree, np.array(reduced) / value * SCALE, rest, value / SCALE, held)
        relaxed = relax(replace(program, costs=program.costs / SCALE))
        assert relaxed is not None, "a plan is known"
        at = len(tree.choices)
        prices = [price * unit * value for price, unit in zip(relaxed.prices[at : at + len(held)], units, strict=True)]
        nodes = None if gap is not None else max(50, WORK // len(program.costs))
        excluded: list[tuple[int, ...]] = []
        while True:
            found = search(_without(program, excluded), np.isin(np.arange(len(own)), taken), gap or 0.0, nodes)
            if found.values is None:  # nothing was found beside the start, which stays
                below, exhausted = max(0.0, SCALE - found.bound), found.exhausted
                break
            candidate = tuple(int(option) for option in np.flatnonzero(np.round(found.values[: len(own)])))
            if meets(tree, rows, candidate):
                taken, below, exhausted = candidate, max(0.0, found.objective - found.bound), found.exhausted
                break
            excluded.append(candidate)
        below = below * value / SCALE if below > RESOLUTION else 0.0
    objective = math.fsum([costs[option] for option in taken] + _products_of(tree, products, taken))
    each = iter(prices)
    by_row = tuple(0.0 if row is None else float(next(each)) / divisor for row, divisor in tight)
    status = "optimal" if exhausted else "stopped at the limit of work"
    return Solution(taken, objective, objective - below, status, time.perf_counter() - start, by_row)


def _start(tree: ChoiceTree, costs: np.ndarray, products: Products, rows: Sequence[Row]) -> tuple[tuple[int, ...], float] | None:
    """(The options of a good plan, what no plan costs less than); None where no options meet the rows."""
    matrix = np.diag(costs)
    for (first, second), together in products.items():
        firsts, seconds = tree.choices[first].options, tree.choices[second].options
        matrix[np.ix_(firsts, seconds)] += together / 2
        matrix[np.ix_(seconds, firsts)] += together.T / 2
    if solve(tree, costs.tolist(), rows, gap=1.0) is None:
        return None
    bound, by_tangent = tangent(tree, matrix, rows)
    cheap = solve(tree, by_tangent.tolist(), rows, gap=0.01)
    assert cheap is not None
    return swap(tree, matrix, rows, cheap.taken), bound


def _separate(tree: ChoiceTree, costs: np.ndarray, products: Products) -> tuple[np.ndarray, dict[tuple[int, int], np.ndarray]]:
    """(The options' own costs with what each pair costs at least, the rest of the pairs, at least 0 and not all 0)."""
    own, rest = costs.copy(), {}
    for (first, second), together in sorted(products.items()):
        at_least = together.min(axis=1)
        own[list(tree.choices[first].options)] += at_least
        left = together - at_least[:, None]
        own[list(tree.choices[second].options)] += left.min(axis=0)
        left = left - left.min(axis=0)
        if left.any():
            rest[first, second] = left
    return own, rest


def _products_of(tree: ChoiceTree, products: Products, taken: Sequence[int]) -> list[float]:
    chosen = set(taken)
    column = [next(i for i, option in enumerate(choice.options) if option in chosen) for choice in tree.choices]
    return [float(together[column[first], column[second]]) for (first, second), together in products.items()]


def _value(tree: ChoiceTree, costs: Sequence[float], products: Products, taken: Sequence[int]) -> float:
    return math.fsum([costs[option] for option in taken] + _products_of(tree, products, taken))


def _program(tree: ChoiceTree, costs: np.ndarray, products: Products, unit: float, rows: Sequence[Row]) -> tuple[Program, list[float]]:
    """Options, then products: a row a choice, a row a budget, and for each pair a row an option of either; and the budgets' units."""
    units = [min(1.0, 1e6 / max(row.amounts)) for row in rows]
    exactly = [1.0] * len(tree.choices)
    entries = [(i, option, 1.0) for i, choice in enumerate(tree.choices) for option in choice.options]
    height, width = len(exactly), len(costs)
    entries += [
        (height + i, option, amount * unit)
        for i, (row, unit) in enumerate(zip(rows, units, strict=True))
        for option, amount in enumerate(row.amounts)
        if amount
    ]
    height += len(rows)
    prices = [costs]
    for (first, second), together in products.items():
        firsts, seconds = tree.choices[first].options, tree.choices[second].options
        for i, one in enumerate(firsts):
            entries += [(height + i, width + i * len(seconds) + j, 1.0) for j in range(len(seconds))] + [(height + i, one, -1.0)]
        height += len(firsts)
        for j, other in enumerate(seconds):
            entries += [(height + j, width + i * len(seconds) + j, 1.0) for i in range(len(firsts))] + [(height + j, other, -1.0)]
        height, width = height + len(seconds), width + together.size
        prices.append(together.ravel() / unit)
    at_row, at_column, values = zip(*entries, strict=True)
    matrix = scipy.sparse.csr_array((values, (at_row, at_column)), shape=(height, width))
    ends = np.zeros(height - len(exactly) - len(rows))
    limits = [row.limit * unit for row, unit in zip(rows, units, strict=True)]
    lower = np.concatenate([exactly, np.full(len(rows), -np.inf), ends])
    return Program(np.concatenate(prices), matrix, lower, np.concatenate([exactly, limits, ends]), len(costs)), units


def _without(program: Program, excluded: Sequence[tuple[int, ...]]) -> Program:
    """The program with a row for each plan that HiGHS may not return again."""
    if not excluded:
        return program
    at_row, at_column = zip(*((row, option) for row, taken in enumerate(excluded) for option in taken), strict=True)
    cuts = scipy.sparse.csr_array((np.ones(len(at_row)), (at_row, at_column)), shape=(len(excluded), len(program.costs)))
    lower = np.concatenate([program.lower, np.full(len(excluded), -np.inf)])
    upper = np.concatenate([program.upper, [len(taken) - 1.0 for taken in excluded]])
    return Program(program.costs, scipy.sparse.csr_array(scipy.sparse.vstack([program.matrix, cuts])), lower, upper, program.whole)
