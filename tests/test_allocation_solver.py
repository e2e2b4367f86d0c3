"""The allocator against brute force on hundreds of small problems, and its promises: proven, exact, independent of any order."""

import math
import random
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from allocation_problems import Problem, deit, make_latencies, make_layer, make_profile, make_table, plain_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

import vitq.allocation.solver as solver
from vitq.allocation import allocate
from vitq.allocation.choices import Choice, ChoiceTree
from vitq.allocation.highs import Program
from vitq.allocation.solver import Row, solve
from vitq.artifacts import Profile, dump
from vitq.errors import BudgetError

__all__ = ["plain_sizes"]  # a fixture for every test here


@st.composite
def problems(draw: Any, bits_apart: bool) -> Problem:
    """Up to 4 (apart) or 6 (tied) layers, some sharing tensors, some fixed, with 1 to 3 budgets of different kinds."""
    chance = random.Random(draw(st.integers(0, 2**40)))
    count = draw(st.integers(1, 4 if bits_apart else 6))
    tensors = [f"t{i}" for i in range(draw(st.integers(1, 2 * count)))]
    kinds = ["qkv", "fc1", "head"] if draw(st.booleans()) else ["qkv"]
    layers = []
    for position in range(count):
        reads = chance.sample(tensors, 2) if len(tensors) > 1 and chance.random() < 0.3 else [chance.choice(tensors)]
        name = f"l{chance.randrange(10**6)}.{position}"
        layers.append(make_layer(name, chance.choice(kinds), chance.randint(1, 200), chance.randint(1, 500), reads, chance.randint(1, 9)))
    bits = tuple(sorted(chance.sample([2, 3, 4, 6, 8], 3 if bits_apart else chance.choice([2, 3, 4]))))
    scale = draw(st.sampled_from([1.0, 1e-9, 1e4]))
    profile = make_profile(layers, make_table(layers, bits, chance, scale, draw(st.booleans())), chance.randint(0, 900))
    fixed = {layer.name: (8, 8) for layer in layers if layer.type == "head"}
    latencies = make_latencies(layers, chance)
    problem = Problem(profile, bits, bits_apart, fixed, latencies=latencies)
    return replace(problem, budgets=[draw_budget(problem, chance) for _ in range(draw(st.integers(1, 3)))])


def draw_budget(problem: Problem, chance: random.Random) -> str:
    """A budget that some assignment meets exactly, or that is a little below or above."""
    drawn = chance.choice(list(problem.assignments()))
    values = problem.measure(drawn)
    looser = chance.choice([Fraction(1), Fraction(1), Fraction(9, 10), Fraction(11, 10)])
    weight, activation = (math.ceil(values[kind] * looser * 1000) / 1000 for kind in ("weight", "activation"))
    return chance.choice(
        [
            f"{max(weight, activation):.3f}",
            f"{weight:.3f}/{activation:.3f}",
            f"size={math.floor(values['size'] * looser)}B",
            f"bops={math.floor(values['bops'] * looser)}",
            f"like={chance.choice(problem.bits)}",
            f"latency={max(0, math.floor(problem.latency(drawn) * looser * 10**6)) / 10**6:.6f}ms",
        ]
    )


def check_against_brute_force(problem: Problem) -> None:
    best = problem.best(problem.budgets)
    shuffle = shuffled(problem.profile, 1)
    if best is None:
        with pytest.raises(BudgetError, match="reachable"):
            allocate(problem.profile, problem.budgets, **problem.options)
        return
    allocation = allocate(problem.profile, problem.budgets, **problem.options)
    report, plan = allocation.report, allocation.plan
    chosen = {entry.name: (entry.weight_bits, entry.activation_bits) for entry in plan.layers}
    largest = max(abs(cost) for table in (problem.profile.costs["random"],) for costs in table.tied.values() for cost in costs)
    assert math.isclose(report["objective"], best, rel_tol=1e-9, abs_tol=1e-13 * largest)
    assert chosen in list(problem.assignments()), "the plan breaks a rule"
    assert problem.meets(chosen, problem.budgets)
    assert math.isclose(report["objective"], problem.cost(chosen), rel_tol=1e-12, abs_tol=1e-300)
    assert report["status"] == "optimal"
    assert report["bound"] <= report["objective"]
    assert report["gap"] == 0
    plan.check(problem.profile.layers)
    assert dump(allocate(shuffle, problem.budgets, **problem.options).plan) == dump(plan)


@settings(max_examples=250)
@given(problem=problems(bits_apart=False))
def test_tied_widths_are_as_good_as_brute_force(problem: Problem) -> None:
    check_against_brute_force(problem)


@settings(max_examples=200)
@given(problem=problems(bits_apart=True))
def test_widths_apart_are_as_good_as_brute_force(problem: Problem) -> None:
    check_against_brute_force(problem)


def shuffled(profile: Profile, seed: int) -> Profile:
    """The same profile, its layers and every dict of its costs in another order."""
    chance = random.Random(seed)

    def reorder(value: Any) -> Any:
        return dict(chance.sample(list(value.items()), len(value))) if isinstance(value, dict) else value

    tables = {
        name: table.model_copy(update={kind: reorder(getattr(table, kind)) for kind in ("tied", "weight", "activation", "cross")})
        for name, table in profile.costs.items()
    }
    return profile.model_copy(update={"costs": tables, "layers": tuple(chance.sample(profile.layers, len(profile.layers)))})


@pytest.mark.parametrize("flat", [False, True], ids=["measured", "all layers tie"])
@pytest.mark.parametrize("options", [{"budgets": ["3.5"]}, {"budgets": ["3.5", "like=4"], "bits_apart": True}])
def test_the_order_of_layers_and_costs_does_not_change_the_plan(options: dict[str, Any], flat: bool) -> None:
    layers = deit(width=192)
    table = make_table(layers, (2, 3, 4, 5, 6, 8), random.Random(5))
    if flat:
        same = tuple(4.0**-width for width in table.bits)
        table = table.model_copy(
            update={"cross": {}} | {kind: dict.fromkeys(getattr(table, kind), same) for kind in ("tied", "weight", "activation")}
        )
    profile = make_profile(layers, table)
    expected = allocate(profile, **options).plan
    blocks = [entry.name.split(".")[1] for entry in expected.layers if entry.name.endswith("qkv")]
    assert blocks == [str(block) for block in range(12)], "blocks.2 comes before blocks.10"
    for seed in range(3):
        assert dump(allocate(shuffled(profile, seed), **options).plan) == dump(expected)


@pytest.mark.parametrize("bits_apart", [False, True])
@pytest.mark.parametrize("budgets", [["4.0"], ["like=4"]])
def test_a_deit_b_is_solved_to_proven_optimality(budgets: list[str], bits_apart: bool) -> None:
    profile = make_profile(deit(), make_table(deit(), (2, 3, 4, 5, 6, 7, 8), random.Random(1)), rest_bytes=10**6)
    report = allocate(profile, budgets, bits_apart=bits_apart).report
    uniform = allocate(profile, uniform="4").report
    assert (report["status"], report["gap"]) == ("optimal", 0)
    if budgets == ["4.0"]:
        assert report["average_weight_bits"] <= 4 and report["average_activation_bits"] <= 4
    else:
        assert report["size_bytes"] <= uniform["size_bytes"] and report["bops"] <= uniform["bops"]


def line(count: int) -> ChoiceTree:
    """`count` choices of two options each; options 2 i and 2 i + 1 are those of choice i."""
    return ChoiceTree(tuple(() for _ in range(2 * count)), tuple(Choice((2 * i, 2 * i + 1), None) for i in range(count)))


@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1.0, 1e9])
def test_tiny_differences_between_huge_costs_decide(factor: float) -> None:
    """Beside an option of 10^9, two plans that differ by one part in 10^9 of the rest: HiGHS's own tolerances would not see it."""
    costs = [1e9, 0.0, 1 + 1e-9, 0.0, 1.0, 0.0, 1 + 2e-9, 0.0]
    row = Row((0, 10, 0, 10, 0, 10, 0, 10), 30)
    solution = solve(line(4), [cost * factor for cost in costs], [row])
    assert solution is not None
    assert solution.taken == (1, 3, 4, 7)
    assert solution.objective == pytest.approx(factor, rel=1e-15)


def test_one_unit_beyond_an_enormous_budget_is_too_much() -> None:
    """With amounts of 10^15 one unit is far below HiGHS's feasibility tolerance; the exact check has to find it."""
    unit = 10**15
    rows = [Row((0, unit + 1, 0, unit, 0, unit - 1), 2 * unit - 1)]
    solution = solve(line(3), [3.0, 0.0, 2.0, 0.0, 1.5, 0.0], rows)
    assert solution is not None
    assert sum(rows[0].amounts[option] for option in solution.taken) <= rows[0].limit
    assert solution.taken == (0, 3, 5)


def test_a_solution_that_breaks_a_budget_is_excluded_and_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS is handed no budget rows at all: only the exact check stands between that and a wrong plan."""
    whole, asked = solver.search, []

    def without_budgets(program: Program, *options: Any) -> Any:
        asked.append(program.matrix.shape[0])
        upper = program.upper.copy()
        upper[3] = np.inf
        return whole(replace(program, upper=upper), *options)

    monkeypatch.setattr(solver, "search", without_budgets)
    solution = solve(line(3), [3.0, 0.0, 2.0, 0.0, 1.5, 0.0], [Row((0, 1, 0, 1, 0, 1), 1)])
    assert solution is not None and solution.taken == (1, 2, 4)
    assert max(asked) > 3 + 1 + 2, "no plan was excluded"


def test_costs_that_are_all_the_same_or_zero_are_solved() -> None:
    for cost in (0.0, 7.0, -7.0):
        solution = solve(line(2), [cost] * 4, [Row((0, 1, 0, 1), 1)])
        assert solution is not None and (solution.objective, solution.bound) == (2 * cost, 2 * cost)


def test_contradicting_rows_have_no_solution() -> None:
    assert solve(line(2), [1.0] * 4, [Row((0, 1, 0, 1), 0), Row((1, 0, 1, 0), 1)]) is None
