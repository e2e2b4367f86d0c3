"""The allocation from end to end: options checked, choices laid out, solved, summed up as a plan and a report.

A metric's costs are all that is known about the model here. Left out: measuring anything; a plan's cost is what the metric predicts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitq.allocation.budgets import ACCEPTED, Budget, parse_budget, total
from vitq.allocation.choices import ChoiceTree, Scope, Widths, choice_tree, parse_widths, settle
from vitq.allocation.objectives import OBJECTIVES, Price
from vitq.allocation.solver import Row, Solution, reduce, solve
from vitq.allocation.summary import summarize
from vitq.artifacts import BitPlan, CostTable, LayerBits, Profile
from vitq.errors import BudgetError, InputError, UsageError


@dataclass(frozen=True)
class Allocation:
    """A plan, and what `allocate --json` prints about it."""

    plan: BitPlan
    report: dict[str, Any]


def allocate(
    profile: Profile,
    budgets: Sequence[str] = (),
    *,
    uniform: str | None = None,
    metric: str | None = None,
    bits: Sequence[int] | None = None,
    bits_apart: bool = False,
    fixed: Sequence[str] = (),
) -> Allocation:
    """Chooses the bits of every layer: the least predicted increase of the loss that meets all budgets, proven so.

    Args:
        profile: the layers and what their bits cost.
        budgets: "4.0", "4.0/8.0", "size=3.2MB", "bops=1.5G" or "like=4"; all must hold.
        uniform: "4" or "4/8" in place of budgets: every searched layer at these bits, no search.
        metric: the cost table to minimise; by default the profile's first.
        bits: candidate widths, a part of the table's; by default all of them.
        bits_apart: whether a weight and its layer's input may differ in bits.
        fixed: 'GLOB=8' or 'GLOB=4/8': layers that keep these bits; patch embedding and head are at 8 unless given here.

    Returns:
        The plan, its layers in the order of the profile, and the report. `objective`, `bound` are in the unit of the table.

    Raises:
        UsageError: an option that is not understood, names nothing, or asks for a width without a cost.
        InputError: a profile without layers or costs.
        BudgetError: budgets that no plan meets; the message gives the smallest and largest value that each can reach.
    """
    if bool(budgets) == (uniform is not None):
        given = "both budgets and a uniform width were" if budgets else "neither a budget nor a uniform width was"
        raise UsageError(f"{given} given; {ACCEPTED} with --budget, or --uniform 4 for no search")
    if not profile.layers:
        raise InputError("the profile has no layers; run `vitq profile MODEL --images PATH` on a model that has some")
    name, table = _table(profile, metric)
    candidates = _candidates(table, bits, name)
    scope = settle(profile.layers, fixed)
    price = OBJECTIVES["sum"](table, bits_apart)
    if uniform is not None:
        widths = scope.uniform(*parse_widths(uniform, "--uniform"))
        objective = math.fsum(price(*entry) for entry in widths)
        solution = Solution((), objective, objective, "uniform", 0.0)
    else:
        tree = choice_tree(scope, candidates, bits_apart)
        limits = [budget for text in budgets for budget in parse_budget(text, scope, profile.rest_bytes)]
        solution = _cheapest(tree, price, limits, candidates)
        widths = tuple(entry for option in solution.taken for entry in tree.options[option])
    certificate = {
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": (solution.objective - solution.bound) / max(abs(solution.objective), 1e-12),
        "status": solution.status,
    }
    summary = summarize(scope, widths, profile.rest_bytes, budgets) | certificate
    asked = {"metric": name, "budgets": list(budgets), "uniform": uniform, "bits": candidates, "bits_apart": bits_apart}
    asked["fixed"] = list(fixed)
    return Allocation(_plan(profile, scope, widths, summary, asked), summary | {"solve_seconds": solution.seconds})


def _table(profile: Profile, metric: str | None) -> tuple[str, CostTable]:
    if not profile.costs:
        raise InputError("the profile holds no costs; run `vitq profile MODEL --images PATH` again")
    name = metric if metric is not None else next(iter(profile.costs))
    if name not in profile.costs:
        raise UsageError(
            f"metric {name!r} is not in the profile, which has {', '.join(profile.costs)}; choose one or run `vitq profile --metric {name}`"
        )
    return name, profile.costs[name]


def _candidates(table: CostTable, bits: Sequence[int] | None, metric: str) -> list[int]:
    candidates = sorted(set(table.bits if bits is None else bits))
    if not candidates or not set(candidates) <= set(table.bits):
        given, priced = (",".join(map(str, widths)) for widths in (candidates, table.bits))
        raise UsageError(
            f"--bits {given or 'names no width'}: metric {metric!r} has costs at {priced}; choose among these, "
            "or run `vitq profile` again with others in its --bits"
        )
    return candidates


def _cheapest(tree: ChoiceTree, price: Price, budgets: Sequence[Budget], candidates: Sequence[int]) -> Solution:
    rows = [Row(tuple(total(budget.amount, option) for option in tree.options), budget.limit) for budget in budgets]
    reachable = [_reachable(tree, row) for row in rows]
    missed = [budget for budget, (smallest, _) in zip(budgets, reachable, strict=True) if smallest > budget.limit]
    # A sum over the layers of one option, each exactly once, so that its rounding does not depend on the profile's order.
    costs = [math.fsum(price(*entry) for entry in option) for option in tree.options]
    solution = None if missed else solve(tree, costs, rows)
    if solution is None:
        ranges = "; ".join(
            f"{budget.quantity} of {budget.text!r}: {budget.show(smallest)} to {budget.show(largest)}"
            for budget, (smallest, largest) in zip(budgets, reachable, strict=True)
        )
        what = f"budget {missed[0].text!r} cannot be met" if missed else "each budget can be met alone, but not all together"
        given = ",".join(map(str, candidates))
        raise BudgetError(
            f"{what}; with bits {given} and the fixed layers, reachable are: {ranges}; raise the budget or change --bits or --fixed"
        )
    return solution


def _reachable(tree: ChoiceTree, row: Row) -> tuple[int, int]:
    """The smallest and largest sum that any plan has, whatever the other budgets."""
    return reduce(tree, row.amounts)[1], -reduce(tree, [-amount for amount in row.amounts])[1]


def _plan(profile: Profile, scope: Scope, widths: Sequence[Widths], summary: dict[str, Any], asked: dict[str, Any]) -> BitPlan:
    chosen = {layer.name: {"weight_bits": weight, "activation_bits": activation} for layer, weight, activation in widths}
    layers = tuple(LayerBits.model_validate({"name": layer.name, "type": layer.type} | chosen[layer.name]) for layer in profile.layers)
    fixed = tuple(layer.name for layer in profile.layers if layer.name in scope.fixed)
    return BitPlan(model=profile.model, layers=layers, fixed=fixed, summary=summary, made_from=profile.made_from | {"allocation": asked})
