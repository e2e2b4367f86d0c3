"""The allocation from end to end: options checked, choices laid out, solved, summed up as a plan and a report.

A metric's costs are all that is known about the model here. Left out: measuring anything; a plan's cost is what the metric predicts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from vitq.allocation.budgets import ACCEPTED, Budget, Whole, average_limits, parse_budget, total
from vitq.allocation.choices import ChoiceTree, Scope, Widths, choice_tree, in_words_and_numbers, parse_widths, settle
from vitq.allocation.choices import paper_parity as papers_fixed
from vitq.allocation.objectives import GAMMA, OBJECTIVES, Objective
from vitq.allocation.pairwise import Products, solve_with_products
from vitq.allocation.presets import find_preset
from vitq.allocation.shadow import shadow_prices
from vitq.allocation.solver import Row, Solution, reduce, solve
from vitq.allocation.summary import summarize
from vitq.allocation.ties import widest_first
from vitq.artifacts import WIDTHS, BitPlan, CostTable, LayerBits, Profile
from vitq.errors import BudgetError, InputError, UsageError
from vitq.latency import LatencyTable


@dataclass(frozen=True)
class Allocation:
    """A plan, and what `allocate --json` prints about it."""

    plan: BitPlan
    report: dict[str, Any]


_HALVES_GAP = 1e-3  # of the plans that half of the images choose: they are only priced


@dataclass(frozen=True)
class Wishes:
    """What is asked of an allocation beside its budgets; each as `allocate` has it."""

    metric: str | None = None
    bits: Sequence[int] | None = None
    bits_apart: bool = False
    fixed: Sequence[str] = ()
    paper_parity: bool = False
    objective: str | None = None
    gamma: float | None = None
    preset: str | None = None


@dataclass(frozen=True)
class Search:
    """What is chosen from and what is minimised: all of an allocation but its budgets.

    `metric`, `objective_name`, `candidates`, `fixed` and `gamma` are what the wishes, or a preset, came to. `costs` has one number an
    option of `tree`; `products` what pairs of choices cost together.
    """

    profile: Profile
    scope: Scope
    metric: str
    objective_name: str
    gamma: float
    candidates: tuple[int, ...]
    bits_apart: bool
    fixed: tuple[str, ...]
    objective: Objective
    tree: ChoiceTree
    costs: tuple[float, ...]
    products: Products
    latencies: LatencyTable | None = None

    @property
    def whole(self) -> Whole:
        """What budgets and sums have to know beside the layers."""
        return Whole(self.profile.rest_bytes, self.latencies)

    def limits(self, budgets: Sequence[str]) -> list[Budget]:
        """The budgets, read."""
        return [budget for text in budgets for budget in parse_budget(text, self.scope, self.whole)]

    @property
    def unit(self) -> str:
        """What the objective is in."""
        return self.profile.costs[self.metric].unit

    def solve(self, budgets: Sequence[Budget], gap: float | None = None) -> Solution | None:
        """The cheapest options within the budgets, of several the first as `ties` has it; None where there are none."""
        rows = [Row(tuple(total(budget.amount, option) for option in self.tree.options), budget.limit) for budget in budgets]
        if any(reduce(self.tree, row.amounts)[1] > row.limit for row in rows):
            return None
        if self.products:
            return solve_with_products(self.tree, self.costs, self.products, rows, gap)
        found = solve(self.tree, self.costs, rows, gap)
        return None if found is None else widest_first(self.tree, self.costs, rows, found)

    def widths(self, solution: Solution) -> tuple[Widths, ...]:
        """The widths of every layer in a solution."""
        return tuple(entry for option in solution.taken for entry in self.tree.options[option])


def allocate(
    profile: Profile,
    budgets: Sequence[str] = (),
    *,
    uniform: str | None = None,
    metric: str | None = None,
    bits: Sequence[int] | None = None,
    bits_apart: bool = False,
    fixed: Sequence[str] = (),
    paper_parity: bool = False,
    objective: str | None = None,
    gamma: float | None = None,
    preset: str | None = None,
    gap: float | None = None,
    latencies: LatencyTable | None = None,
) -> Allocation:
    """Chooses the bits of every layer: the least predicted increase of the loss that meets all budgets, with a proof of how good it is.

    Args:
        profile: the layers and what their bits cost.
        budgets: "4.0", "4.0/8.0", "size=3.2MB", "bops=1.5G", "like=4" or "latency=4.0ms"; all must hold.
        uniform: "4" or "4/8" in place of budgets: every searched layer at these bits, no search.
        metric: the cost table to minimise; by default the preset's, else the profile's first.
        bits: candidate widths, a part of the table's; by default the preset's, else all of them.
        bits_apart: whether a weight and its layer's input may differ in bits.
        fixed: 'GLOB=8' or 'GLOB=4/8': layers that keep these bits; patch embedding and head are at 8 unless given here.
        paper_parity: patch embedding and head not at 8 bits but as the post-training papers have them (`choices.paper_parity`), at the
            whole bits of the uniform width, of the average or of `like=`; `fixed` wins.
        objective: a name in `OBJECTIVES`; by default the preset's, else `sum`.
        gamma: by how much one bit more divides a cost, above 1, for the objective `gamma`; by default 4.
        preset: a name in `PRESETS`, what a paper does.
        gap: `(objective - bound) / |objective|` at which to stop, however long that takes; by default 0, unless that takes too much work.
        latencies: measured ones, for a budget of latency; where given, the report has the plan's predicted `latency_ms`.

    Returns:
        The plan, its layers sorted by name (blocks.2 before blocks.10), and the report. `objective`, `bound` are in the unit of the table.
        `predicted` is what the plan can be expected to cost on other images, where the table has halves: what one half's plan costs by
        the other's prices; else the objective, which is too low by the luck that the plan was chosen for.
        Of several plans that cost the least, the one that has more bits where they first differ (`allocation.ties`).

    Raises:
        UsageError: an option that is not understood, names nothing, or asks for a width without a cost.
        InputError: a profile without layers or costs; latencies that are missing or of another model.
        BudgetError: budgets that no plan meets; the message gives the smallest and largest value that each can reach.
    """
    if bool(budgets) == (uniform is not None):
        given = "both budgets and a uniform width were" if budgets else "neither a budget nor a uniform width was"
        raise UsageError(f"{given} given; {ACCEPTED} with --budget, or --uniform 4 for no search")
    wishes = Wishes(metric, bits, bits_apart, fixed, paper_parity, objective, gamma, preset)
    search = lay_out(profile, wishes, budgets, uniform, latencies)
    if uniform is not None:
        widths = search.scope.uniform(*parse_widths(uniform, "--uniform"))
        value = search.objective.total(widths)
        solution, prices, predicted = Solution((), value, value, "uniform", 0.0), [], value
    else:
        limits = search.limits(budgets)
        solution = search.solve(limits, gap)
        if solution is None:
            raise BudgetError(_out_of_reach(search, limits))
        widths = search.widths(solution)
        priced = list(zip(limits, solution.prices, strict=True))
        prices = shadow_prices(search.scope, widths, priced, search.objective, search.candidates, bits_apart, search.unit)
        predicted = _elsewhere(search, wishes, budgets, limits)
    certificate = {
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": (solution.objective - solution.bound) / max(abs(solution.objective), 1e-12),
        "status": solution.status,
        "predicted": solution.objective if predicted is None else predicted,
        "shadow_prices": prices,
    }
    summary = summarize(search.scope, widths, search.whole, budgets) | certificate
    asked = {"metric": search.metric, "objective": search.objective_name, "budgets": list(budgets), "uniform": uniform}
    asked |= {"bits": list(search.candidates), "bits_apart": bits_apart, "fixed": list(search.fixed)}
    asked |= {"gamma": search.gamma} if search.objective_name == "gamma" else {}
    asked |= {"preset": preset} if preset is not None else {}
    return Allocation(_plan(profile, search.scope, widths, summary, asked), summary | {"solve_seconds": solution.seconds})


def _elsewhere(search: Search, wishes: Wishes, budgets: Sequence[str], limits: Sequence[Budget]) -> float | None:
    """The mean cost, by the prices of one half of the images, of the plan that the other half chooses; None without halves."""
    table = search.profile.costs[search.metric]
    costs = []
    for chosen, judge in permutations(table.halves, 2) if search.objective_name == "sum" else ():
        profile = search.profile.model_copy(update={"costs": search.profile.costs | {search.metric: chosen}})
        here = lay_out(profile, wishes, budgets, latencies=search.latencies)
        solution = here.solve(limits, _HALVES_GAP)
        if solution is None:
            return None
        prices = OBJECTIVES[search.objective_name](judge, search.bits_apart, search.gamma)
        costs.append(prices.total(here.widths(solution)))
    return sum(costs) / len(costs) if costs else None


def lay_out(
    profile: Profile, wishes: Wishes, budgets: Sequence[str] = (), uniform: str | None = None, latencies: LatencyTable | None = None
) -> Search:
    """The options that are left and what they cost; arguments and errors as those of `allocate`.

    Budgets and uniform width set no limit here: they say which bits a preset and `paper_parity` speak of.
    """
    if not profile.layers:
        raise InputError("the profile has no layers; run `vitq profile MODEL --images PATH` on a model that has some")
    if latencies is not None:
        latencies.check(profile.layers, profile.model.graph_digest)
    metric, objective, bits, gamma = wishes.metric, wishes.objective, wishes.bits, wishes.gamma
    if wishes.preset is not None:
        paper = find_preset(wishes.preset, profile.costs, metric)
        metric, objective = metric or paper.metric, objective or paper.objective
        bits = bits if bits is not None else paper.bits(budgets)
    name, table = _table(profile, metric)
    objective = "sum" if objective is None else objective
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r} is not known; give one of {', '.join(OBJECTIVES)}")
    if gamma is not None and not 1 < gamma < 1e6:
        raise UsageError(f"--gamma {gamma:g} cannot be used: it is by how much a bit divides the cost; give a number above 1, such as 4")
    if gamma is not None and objective != "gamma":
        raise UsageError(f"--gamma has no meaning for objective {objective!r}; leave it out or give --objective gamma")
    gamma = GAMMA if gamma is None else gamma
    candidates = _candidates(table, bits, name)
    papers = papers_fixed(*_nominal(budgets, uniform), profile.layers) if wishes.paper_parity else []
    fixed = (*papers, *wishes.fixed)
    scope = settle(profile.layers, fixed)
    minimised = OBJECTIVES[objective](table, wishes.bits_apart, gamma)
    tree = choice_tree(scope, candidates, wishes.bits_apart)
    inside, products = _products(tree, minimised)
    # A sum over the layers of one option, each exactly once, so that its rounding does not depend on the profile's order.
    costs = tuple(Objective(minimised.price, inside.get(at, {})).total(option) for at, option in enumerate(tree.options))
    chosen = (tuple(candidates), wishes.bits_apart, fixed)
    return Search(profile, scope, name, objective, gamma, *chosen, minimised, tree, costs, products, latencies)


def _products(tree: ChoiceTree, objective: Objective) -> tuple[dict[int, dict[Any, Any]], Products]:
    """The pairs of layers by where they meet: (within one option, the pairs that it pays; between choices, their tables)."""
    if not objective.pairs:
        return {}, {}
    home = {entry.layer.name: at for at, choice in enumerate(tree.choices) for entry in tree.options[choice.options[0]]}
    inside: dict[int, dict[Any, Any]] = {}
    products: dict[tuple[int, int], np.ndarray] = {}
    for (first, second), price in sorted(objective.pairs.items()):
        if home[first] == home[second]:
            for option in tree.choices[home[first]].options:
                inside.setdefault(option, {})[first, second] = price
            continue
        bits = {
            layer: [
                next(e.activation_bits for e in tree.options[option] if e.layer.name == layer)
                for option in tree.choices[home[layer]].options
            ]
            for layer in (first, second)
        }
        together = np.array([[price(one, other) for other in bits[second]] for one in bits[first]])
        key, together = ((home[first], home[second]), together) if home[first] < home[second] else ((home[second], home[first]), together.T)
        products[key] = products.get(key, 0.0) + together
    return inside, products


def _nominal(budgets: Sequence[str], uniform: str | None) -> tuple[int, int]:
    """The whole (weight, activation) bits that the options speak of."""
    if uniform is not None:
        return parse_widths(uniform, "--uniform")
    asked = average_limits([text.removeprefix("like=") for text in budgets])
    levels = [min(int(level), WIDTHS[-1]) for level in asked if level is not None and level >= WIDTHS[0]]
    if len(levels) < 2:
        raise UsageError("--paper-parity needs to know the bits that patch embedding and head have; give --uniform 4, like=4 or an average")
    return levels[0], levels[1]


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


def _out_of_reach(search: Search, budgets: Sequence[Budget]) -> str:
    """What to say where no plan meets the budgets."""
    rows = [Row(tuple(total(budget.amount, option) for option in search.tree.options), budget.limit) for budget in budgets]
    reachable = [_reachable(search.tree, row) for row in rows]
    missed = [budget for budget, (smallest, _) in zip(budgets, reachable, strict=True) if smallest > budget.limit]
    ranges = "; ".join(
        f"{budget.quantity} of {budget.text!r}: {budget.show(smallest)} to {budget.show(largest)}"
        for budget, (smallest, largest) in zip(budgets, reachable, strict=True)
    )
    what = f"budget {missed[0].text!r} cannot be met" if missed else "each budget can be met alone, but not all together"
    given = ",".join(map(str, search.candidates))
    return f"{what}; with bits {given} and the fixed layers, reachable are: {ranges}; raise the budget or change --bits or --fixed"


def _reachable(tree: ChoiceTree, row: Row) -> tuple[int, int]:
    """The smallest and largest sum that any plan has, whatever the other budgets."""
    return reduce(tree, row.amounts)[1], -reduce(tree, [-amount for amount in row.amounts])[1]


def _plan(profile: Profile, scope: Scope, widths: Sequence[Widths], summary: dict[str, Any], asked: dict[str, Any]) -> BitPlan:
    """The plan, in an order that depends on nothing but the names of the layers."""
    ordered = sorted(widths, key=lambda entry: in_words_and_numbers(entry.layer.name))
    layers = tuple(
        LayerBits.model_validate({"name": layer.name, "type": layer.type, "weight_bits": weight_bits, "activation_bits": activation_bits})
        for layer, weight_bits, activation_bits in ordered
    )
    fixed = tuple(entry.name for entry in layers if entry.name in scope.fixed)
    return BitPlan(model=profile.model, layers=layers, fixed=fixed, summary=summary, made_from=profile.made_from | {"allocation": asked})
