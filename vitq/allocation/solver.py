"""Multiple-choice knapsack over a tree of choices, solved to proven optimality: cvxpy with HiGHS, checked in exact integers.

How it works. Costs and amounts are first *reduced*: what is paid whichever option is taken moves out, so that all are at least 0 and
the cheapest plan costs 0; budget rows are divided by their common divisor. HiGHS stops at a relative gap of 1e-4 unless told
otherwise and overlooks improvements below an absolute 1e-6, so both gaps are set to 0, and a first, quick solve finds a plan whose
reduced cost then scales the next solve to 10^6: what HiGHS overlooks is 10^-12 of that. Options that alone cost more than a known
plan are left out. The binaries are rounded and every row is checked in exact integers; a solution that passed only within HiGHS's
tolerance is excluded and the problem solved again.

Deterministic: one thread, one seed, no time limit, and variables in the order of the tree, which is by layer name; so equal problems
are the same input to HiGHS and ties fall the same way. Left out: interrupting a solve.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cvxpy
import numpy as np
import scipy.sparse

from vitq.allocation.choices import ChoiceTree

FIRST_GAP = 1e-2
SCALE = 1e6
"""What the best plan known so far costs in the objective that HiGHS sees."""
RESOLUTION = 1e-6
"""What HiGHS cannot tell apart in that objective."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Row:
    """One budget: the sum of `amounts` (one an option, whole) over the taken options is at most `limit`."""

    amounts: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class Solution:
    """The taken options, ascending; the sum of their costs, a proven lower bound of it, the solver's status and wall seconds."""

    taken: tuple[int, ...]
    objective: float
    bound: float
    status: str
    seconds: float


def solve(tree: ChoiceTree, costs: Sequence[float], rows: Sequence[Row]) -> Solution | None:
    """The cheapest options that meet every row, proven so; None where no options meet them all.

    Args:
        tree: the options and the choices among them.
        costs: one an option, finite.
        rows: the budgets.
    """
    start = time.perf_counter()
    reduced, _ = reduce(tree, costs)
    tight = [row for row in (_tighten(tree, row) for row in rows) if row is not None]
    known, gap = max(reduced, default=0.0) or 1.0, FIRST_GAP
    while True:
        # A plan no dearer than the known one takes no option that alone costs more; 1e-9 covers the rounding of `reduce`.
        scaled = [cost / known * SCALE if cost <= known * (1 + 1e-9) else math.inf for cost in reduced]
        found = _search(tree, scaled, tight, gap)
        if found is None:
            assert gap > 0, "the known plan was left out"
            return None
        taken, below, status = found
        value = math.fsum(reduced[option] for option in taken)
        if value == 0 or (gap == 0 and value > known / 10):
            break
        known, gap = value, 0.0
    objective = math.fsum(costs[option] for option in taken)
    # Nothing is below a reduced cost of 0, whatever the first solve's gap.
    bound = objective - below / SCALE * known if value > 0 else objective
    return Solution(taken, objective, bound, status, time.perf_counter() - start)


def reduce(tree: ChoiceTree, values: Sequence[Number]) -> tuple[list[Number], Number]:
    """Moves the least of each choice to the option it hangs under, or out: (values, each at least 0; what is always paid).

    What is always paid is also the smallest sum that any plan has.
    """
    reduced, always = list(values), type(values[0])(0) if values else 0
    for choice in reversed(tree.choices):
        least = min(reduced[option] for option in choice.options)
        for option in choice.options:
            reduced[option] -= least
        if choice.under is None:
            always += least
        else:
            reduced[choice.under] += least
    return reduced, always


def _tighten(tree: ChoiceTree, row: Row) -> Row | None:
    """The same row in the smallest integers; None where it always holds."""
    amounts, always = reduce(tree, row.amounts)
    _, least_negated = reduce(tree, [-amount for amount in amounts])
    if -least_negated <= row.limit - always:
        return None
    divisor = math.gcd(*amounts)
    return Row(tuple(amount // divisor for amount in amounts), (row.limit - always) // divisor)


def _search(tree: ChoiceTree, costs: list[float], rows: Sequence[Row], gap: float) -> tuple[tuple[int, ...], float, str] | None:
    """(taken options, objective minus proven bound, status) at these costs; an option of infinite cost may not be taken."""
    taken_before: list[tuple[int, ...]] = []
    while True:
        taken = cvxpy.Variable(len(tree.options), boolean=True)
        objective = cvxpy.Minimize(np.array([cost if math.isfinite(cost) else 0.0 for cost in costs]) @ taken)
        problem = cvxpy.Problem(objective, _constraints(tree, costs, rows, taken, taken_before))
        # `parallel` and not `threads`: HiGHS fails when a later solve in the process asks for another number of threads.
        problem.solve(solver=cvxpy.HIGHS, mip_rel_gap=gap, mip_abs_gap=0.0, parallel="off", random_seed=0)
        if problem.status == cvxpy.INFEASIBLE:
            return None
        if problem.status != cvxpy.OPTIMAL or taken.value is None:
            raise RuntimeError(f"HiGHS ended with status {problem.status!r} on an allocation problem")
        chosen = tuple(int(option) for option in np.flatnonzero(np.round(taken.value)))
        if _one_of_each(tree, chosen) and all(sum(row.amounts[option] for option in chosen) <= row.limit for row in rows):
            statistics: Any = problem.solver_stats.extra_stats
            below = statistics.objective_function_value - statistics.mip_dual_bound
            return chosen, below if below > RESOLUTION else 0.0, problem.status
        taken_before.append(chosen)


def _constraints(
    tree: ChoiceTree, costs: Sequence[float], rows: Sequence[Row], taken: cvxpy.Variable, excluded: Sequence[tuple[int, ...]]
) -> list[Any]:
    count, choices = len(tree.options), len(tree.choices)
    entries = [(row, option, 1.0) for row, choice in enumerate(tree.choices) for option in choice.options]
    entries += [(row, choice.under, -1.0) for row, choice in enumerate(tree.choices) if choice.under is not None]
    exactly_one = np.array([1.0 if choice.under is None else 0.0 for choice in tree.choices])
    constraints: list[Any] = [_matrix(entries, choices, count) @ taken == exactly_one]
    if rows:
        # Above 10^6 a unit is scaled down towards HiGHS's tolerance; the exact check afterwards catches what that lets through.
        scales = [min(1.0, 1e6 / max(row.amounts)) for row in rows]
        limits = np.array([row.limit * scale for row, scale in zip(rows, scales, strict=True)])
        entries = [(i, option, amount * scales[i]) for i, row in enumerate(rows) for option, amount in enumerate(row.amounts) if amount]
        constraints.append(_matrix(entries, len(rows), count) @ taken <= limits)
    dropped = [option for option, cost in enumerate(costs) if math.isinf(cost)]
    if dropped:
        constraints.append(taken[dropped] == 0)
    constraints += [cvxpy.sum(taken[list(options)]) <= len(options) - 1 for options in excluded]
    return constraints


def _matrix(entries: Sequence[tuple[int, int, float]], rows: int, columns: int) -> scipy.sparse.csr_array:
    at_row, at_column, values = zip(*entries, strict=True)
    return scipy.sparse.csr_array((values, (at_row, at_column)), shape=(rows, columns))


def _one_of_each(tree: ChoiceTree, taken: tuple[int, ...]) -> bool:
    chosen = set(taken)
    return all(
        sum(option in chosen for option in choice.options) == (1 if choice.under is None or choice.under in chosen else 0)
        for choice in tree.choices
    )
