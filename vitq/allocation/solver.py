"""Multiple-choice knapsack over a tree of choices, solved to proven optimality by HiGHS on a small core, checked in exact integers.

How it works. Costs and amounts are first *reduced*: what is paid whichever option is taken moves out, so that all are at least 0 and
the cheapest plan costs 0; budget rows are divided by their common divisor. The relaxation (options taken in part) gives a *price* a unit
of each budget. With each option charged for what it spends at these prices, the cheapest plan is found choice by choice, and no plan
within the budgets costs less than that less the prices of the budgets (Lagrange): a bound `least` that holds whatever the prices. What an
option costs beyond the best one beside it, and so on upwards, is its *excess*: a plan that takes it costs at least `least` + excess.

So HiGHS is given only the options of small excess, a *core*, and its best plan is the best of all where the core holds every excess up
to that plan's cost - `least`. The core grows until it does, each search starting from the best plan so far. A bound is proven at any time:
the smaller of HiGHS's own for the core, and `least` + the smallest excess outside. HiGHS overlooks improvements below 1e-6: costs are
scaled so that the best plan known costs 10^6. The binaries are rounded and every row is checked in exact integers; a solution that passed
only within HiGHS's tolerance is excluded and the core searched again.

Deterministic: variables in the order of the tree, which is by layer name, and a limit on the search tree in place of one on time. Left
out: interrupting a solve; choosing among plans that cost the same (`ties`).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.sparse

from vitq.allocation.choices import ChoiceTree
from vitq.allocation.highs import Program, relax, search

SCALE = 1e6
"""What the best plan known so far costs in the objective that HiGHS sees."""
RELAXED_SCALE = 1e3
"""What the dearest option costs in the relaxation that HiGHS sees."""
RESOLUTION = 1e-6
"""What HiGHS cannot tell apart in that objective."""
ROUNDING = 1e-9
"""What rounding can do to a bound at most, relative to the best plan's cost: no option is left out by less."""
QUICK_NODES = 50
"""Where HiGHS stops in a core that is known to be too small."""
ROUGHLY = 0.1
"""The part of the distance to the bound that is not worth a search in such a core."""
WORK = 1_200_000
"""Where HiGHS stops in the last core unless a gap is asked for: nodes x options, some seconds."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Row:
    """One budget: the sum of `amounts` (one an option, whole) over the taken options is at most `limit`."""

    amounts: tuple[int, ...]
    limit: int


@dataclass(frozen=True)
class Solution:
    """What was found and what is proven of it.

    `taken` are the options, ascending; `objective` the sum of their costs and `bound` what no plan is below. `prices` says for each row
    how much the bound falls for one unit more, at the optimum of the relaxation; 0 where the row does not bind.
    """

    taken: tuple[int, ...]
    objective: float
    bound: float
    status: str
    seconds: float
    prices: tuple[float, ...] = ()


def solve(tree: ChoiceTree, costs: Sequence[float], rows: Sequence[Row], gap: float | None = None) -> Solution | None:
    """The cheapest options that meet every row; None where no options meet them all.

    Args:
        tree: the options and the choices among them.
        costs: one an option, finite.
        rows: the budgets.
        gap: (objective - bound) / |objective| at which to stop, however long that takes; None: 0, unless that takes too much work, and
            then `status` says so.
    """
    start = time.perf_counter()
    reduced, always = reduce(tree, costs)
    tight = [tighten(tree, row) for row in rows]
    core = Core(tree, np.array(reduced), [row for row, _ in tight if row is not None], always)
    found = core.best(gap)
    if found is None:
        return None
    prices = iter(core.prices)
    taken, below, status = found
    objective = math.fsum(costs[option] for option in taken)
    each = tuple(0.0 if row is None else float(next(prices)) / divisor for row, divisor in tight)
    return Solution(taken, objective, objective - below, status, time.perf_counter() - start, each)


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


class Core:
    """The search on growing sets of options; `costs` are reduced ones, `always` what is paid beside them."""

    def __init__(self, tree: ChoiceTree, costs: np.ndarray, rows: Sequence[Row], always: float):
        self.tree, self.costs, self.rows, self.always = tree, costs, list(rows), always
        # Above 10^6 a unit is scaled down towards HiGHS's tolerance; the exact check afterwards catches what that lets through.
        self.units = [min(1.0, 1e6 / max(row.amounts)) for row in rows]
        amounts = [[amount * unit for amount in row.amounts] for row, unit in zip(rows, self.units, strict=True)]
        self.amounts = np.array(amounts, float).reshape(len(rows), len(costs))
        self.limits = np.array([row.limit * unit for row, unit in zip(rows, self.units, strict=True)])
        self.excluded: list[tuple[int, ...]] = []
        self.prices: list[float] = [0.0] * len(rows)
        self.taken: tuple[int, ...] | None = None
        self.value = math.inf

    def best(self, gap: float | None) -> tuple[tuple[int, ...], float, str] | None:
        """(taken options, cost - proven bound, status); None where no options meet the rows."""
        scale = float(self.costs.max(initial=0.0)) or 1.0
        while True:
            least = self.relax(scale)
            if least is None:
                return None
            bound, status = self._grow(least, gap)
            # One enormous cost hides the others from the relaxation; once a plan is known, those that cost more can go.
            if self.taken is None or self.value == 0 or self.value > scale / 1000:
                break
            scale = self.value
        if self.taken is None:
            return None
        below = max(0.0, self.value - bound)
        return self.taken, below if below > RESOLUTION / SCALE * self.value else 0.0, status

    def relax(self, scale: float) -> float | None:
        """Prices of the budgets, the bound that they give, and each option's excess; None where the budgets exclude each other."""
        kept = np.flatnonzero(self.costs <= scale * (1 + ROUNDING))
        relaxed = relax(self.program(kept, scale / RELAXED_SCALE))
        if relaxed is None:
            return None
        prices = relaxed.prices[len(self.tree.choices) :][: len(self.rows)] * scale / RELAXED_SCALE
        charged, least = reduce(self.tree, (self.costs + prices @ self.amounts).tolist())
        self.prices = [price * unit for price, unit in zip(prices, self.units, strict=True)]
        self.excess = np.array(charged)
        for choice in self.tree.choices:
            if choice.under is not None:
                self.excess[list(choice.options)] += self.excess[choice.under]
        self.excess[self.costs > scale * (1 + ROUNDING)] = math.inf
        return least - float(prices @ self.limits)  # below 0 where an option that is left out made `least` small

    def _grow(self, least: float, gap: float | None) -> tuple[float, str]:
        """Searches cores until one is proven to hold the best plan, or the gap is met; (proven bound, status)."""
        order = np.sort(self.excess[np.isfinite(self.excess)])
        size, bound, wanted = len(self.tree.choices) + 4 * len(self.rows) + 1, max(0.0, least), gap or 0.0
        while True:
            # No plan that costs less than the best one known takes an option of more excess than this.
            enough = self.value - least + ROUNDING * self.value
            reach = float(order[size - 1]) if size < len(order) else math.inf
            last = reach >= enough or math.isinf(reach)
            kept = np.flatnonzero(self.excess <= min(reach, enough, order[-1]))
            nodes = QUICK_NODES if not last else None if gap is not None or self.taken is None else max(QUICK_NODES, WORK // len(kept))
            rough = 0.0 if last or self.taken is None or self.value == 0 else ROUGHLY * (self.value - least) / self.value
            inside, exhausted = self._search(kept, least, max(wanted, rough), nodes)
            bound = max(bound, min(inside, least + reach))
            if self.taken is not None and self.value - bound <= wanted * abs(self.always + self.value):
                return bound, "optimal"
            if last:
                return bound, "optimal" if exhausted else "stopped at the limit of work"
            size = len(self.tree.choices) + 2 * (size - len(self.tree.choices))

    def _search(self, kept: np.ndarray, least: float, gap: float, nodes: int | None) -> tuple[float, bool]:
        """Improves the best plan within the kept options; (a bound on all plans within them, whether none of them is better)."""
        if self.value == 0:
            return 0.0, True
        scale = self.value if self.taken is not None else max(least, float(self.costs[kept].max())) or 1.0
        while True:
            start = None
            if self.taken is not None:
                start = np.isin(kept, self.taken)
                start = start if start.sum() == len(self.taken) else None
            found = search(self.program(kept, scale / SCALE), start, gap, nodes)
            if found.values is None:
                return found.bound, found.exhausted
            taken = tuple(int(option) for option in kept[np.round(found.values[: len(kept)]) == 1])
            if meets(self.tree, self.rows, taken):
                value = math.fsum(self.costs[list(taken)])
                if value < self.value:
                    self.taken, self.value = taken, value
                return found.bound * scale / SCALE, found.exhausted
            self.excluded.append(taken)

    def program(self, kept: np.ndarray, unit: float) -> Program:
        """The kept options as a program: a row a choice, a row a budget, a row a plan that HiGHS may not return again."""
        position = {int(option): column for column, option in enumerate(kept)}
        entries = [
            (row, position[option], 1.0) for row, choice in enumerate(self.tree.choices) for option in choice.options if option in position
        ]
        entries += [(row, position[choice.under], -1.0) for row, choice in enumerate(self.tree.choices) if choice.under in position]
        exactly = np.array([1.0 if choice.under is None else 0.0 for choice in self.tree.choices])
        cuts = [taken for taken in self.excluded if all(option in position for option in taken)]
        cut_entries = [(row, position[option], 1.0) for row, taken in enumerate(cuts) for option in taken]
        parts = [_matrix(entries, len(exactly), len(kept)), scipy.sparse.csr_array(self.amounts[:, kept])]
        parts.append(_matrix(cut_entries, len(cuts), len(kept)))
        below = np.concatenate([exactly, np.full(len(self.rows) + len(cuts), -np.inf)])
        above = np.concatenate([exactly, self.limits, [len(taken) - 1.0 for taken in cuts]])
        matrix = scipy.sparse.csr_array(scipy.sparse.vstack(parts))
        return Program(self.costs[kept] / unit, matrix, below, above, len(kept))


def meets(tree: ChoiceTree, rows: Sequence[Row], taken: Sequence[int]) -> bool:
    """Whether one option of each choice is taken and every row holds, in exact integers."""
    chosen = set(taken)
    return all(
        sum(option in chosen for option in choice.options) == (1 if choice.under is None or choice.under in chosen else 0)
        for choice in tree.choices
    ) and all(sum(row.amounts[option] for option in taken) <= row.limit for row in rows)


def tighten(tree: ChoiceTree, row: Row) -> tuple[Row | None, int]:
    """The same row, reduced, in the smallest integers, and what they were divided by; no row where it always holds."""
    amounts, always = reduce(tree, row.amounts)
    _, least_negated = reduce(tree, [-amount for amount in amounts])
    if -least_negated <= row.limit - always:
        return None, 1
    divisor = math.gcd(*amounts)
    return Row(tuple(amount // divisor for amount in amounts), (row.limit - always) // divisor), divisor


def _matrix(entries: Sequence[tuple[int, int, float]], rows: int, columns: int) -> scipy.sparse.csr_array:
    at_row, at_column, values = zip(*entries, strict=True) if entries else ((), (), ())
    return scipy.sparse.csr_array((values, (at_row, at_column)), shape=(rows, columns), dtype=float)
