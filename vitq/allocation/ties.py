"""Which plan of several that cost the same: the one that has the most bits first.

A plan is read as plan.json lists it, layers in order of name (blocks.2 before blocks.10), each as its weight bits, then its activation
bits. Of all plans within the budgets that cost the least, the one is taken that reads largest: where it first differs from any other, it
has more bits. So the plan follows from the problem alone and not from a solver's path, and bits that a budget leaves over are spent: a
metric that sees no difference may overlook one, but a wider layer is not worse. Costs within `TIED` of each other are equal.

Only options of small excess (see `solver`) are in any cheapest plan; mostly they leave a single plan, or few layers to settle. These are
settled by HiGHS in order of name, some at a time, the cost held at the least.

Left out: plans that are not proven the cheapest (a gap was asked for, or the search stopped), terms between layers, and ties that cannot
be settled with as much `WORK` as a plan. There the solver's plan stays, from where ties are unsettled; it does not depend on the
profile's order either.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy.sparse

from vitq.allocation.choices import ChoiceTree, in_words_and_numbers
from vitq.allocation.highs import Program, search
from vitq.allocation.solver import QUICK_NODES, RESOLUTION, ROUNDING, SCALE, WORK, Core, Row, Solution, meets, reduce, tighten

TIED = RESOLUTION / SCALE
"""Relative difference of costs, those that every plan pays left out, below which they are equal."""
SPAN = 2**10
"""How many combinations of bits one search tells apart; a thousand at a time are settled sooner than a million or seven."""
ATTEMPTS = 20
"""How many plans that meet the budgets and the least cost only within HiGHS's tolerance one search may come across."""


def widest_first(tree: ChoiceTree, costs: Sequence[float], rows: Sequence[Row], solution: Solution) -> Solution:
    """The plan with the most bits first of those that cost as much as `solution`, which stays where it is not proven the cheapest."""
    if solution.status != "optimal" or solution.bound < solution.objective:
        return solution
    start = time.perf_counter()
    reduced, always = reduce(tree, costs)
    core = Core(tree, np.array(reduced), [row for row, _ in (tighten(tree, row) for row in rows) if row is not None], always)
    core.taken, core.value = solution.taken, math.fsum(reduced[option] for option in solution.taken)
    kept, ranks = _possible(core), _ranks(tree)
    while len(layers := _undecided(ranks, kept)) > 0:
        settled = _settle(core, kept, layers)
        if settled is None:
            break
        core.taken = settled
        taken = set(settled)
        for name in layers:
            (rank,) = {rank for option, rank in ranks[name].items() if option in taken}
            kept = kept[[ranks[name].get(int(option), rank) == rank for option in kept]]
    objective = math.fsum(costs[option] for option in core.taken)
    seconds = solution.seconds + time.perf_counter() - start
    return replace(solution, taken=core.taken, objective=objective, bound=objective, seconds=seconds)


def _possible(core: Core) -> np.ndarray:
    """The options that a plan of the least cost may take, ascending."""
    if core.value == 0:
        return np.flatnonzero(core.costs == 0)
    least = core.relax(core.value)
    assert least is not None, "a plan is known"
    return np.flatnonzero(core.excess <= core.value - least + ROUNDING * core.value)


def _ranks(tree: ChoiceTree) -> dict[str, dict[int, tuple[int, int]]]:
    """By layer, in order of name: its (weight bits, activation bits) in each option that settles it."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for at, option in enumerate(tree.options):
        for layer, weight_bits, activation_bits in option:
            found.setdefault(layer.name, {})[at] = (weight_bits or 0, activation_bits)
    return {name: found[name] for name in sorted(found, key=in_words_and_numbers)}


def _undecided(ranks: Mapping[str, Mapping[int, tuple[int, int]]], kept: np.ndarray) -> dict[str, dict[int, int]]:
    """The next layers that kept options leave open, as many as one search can settle; each one's options with their places, widest 0."""
    found, span = {}, 1
    for name, by_option in ranks.items():
        left = {int(option): by_option[int(option)] for option in kept if int(option) in by_option}
        order = sorted(set(left.values()), reverse=True)
        if len(order) > 1:
            span *= len(order)
            if span > SPAN:
                break
            found[name] = {option: order.index(bits) for option, bits in left.items()}
    return found


def _settle(core: Core, kept: np.ndarray, layers: Mapping[str, Mapping[int, int]]) -> tuple[int, ...] | None:
    """The options of a cheapest plan in which these layers, in their order, have the most bits; None where that is not found."""
    at = {int(option): column for column, option in enumerate(kept)}
    before = core.taken
    assert before is not None, "a plan is known"
    order, span = np.zeros(len(kept)), 1
    for places in reversed(list(layers.values())):
        for option, place in places.items():
            order[at[option]] += span * place
        span *= 1 + max(places.values())
    for _ in range(ATTEMPTS):
        program = _at_the_least_cost(core, core.program(kept, 1.0), core.costs[kept])
        found = search(replace(program, costs=order), np.isin(kept, before), 0.0, max(QUICK_NODES, WORK // len(kept)))
        if found.values is None or not found.exhausted:
            return None
        taken = tuple(int(option) for option in kept[np.round(found.values[: len(kept)]) == 1])
        if meets(core.tree, core.rows, taken) and math.fsum(core.costs[list(taken)]) <= core.value * (1 + 2 * TIED):
            return taken
        core.excluded.append(taken)
    return None


def _at_the_least_cost(core: Core, program: Program, costs: np.ndarray) -> Program:
    """The program with one more row: what the options cost is at most what the best plan does."""
    if core.value == 0:
        return program
    matrix = scipy.sparse.csr_array(scipy.sparse.vstack([program.matrix, scipy.sparse.csr_array(costs[None] / core.value * SCALE)]))
    return replace(program, matrix=matrix, lower=np.append(program.lower, -np.inf), upper=np.append(program.upper, SCALE))
