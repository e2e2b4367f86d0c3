"""Of plans that cost the same the one that has the most bits first: brute force over small problems with many exact ties."""

import random
from typing import Any

import pytest
from allocation_problems import Assignment, Problem, deit, make_layer, make_profile, make_table, plain_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

import vitq.allocation.ties as ties
from vitq.allocation import allocate
from vitq.artifacts import CostTable, Profile

__all__ = ["plain_sizes"]  # a fixture for every test here
BITS = (2, 3, 4)


def tied_problem(seed: int, bits_apart: bool) -> Problem:
    """Layers of few kinds and costs of few powers of two, whose sums are exact, so that most of the best plans have equals."""
    chance = random.Random(seed)
    count = 4 if bits_apart else 7
    tensors = [f"t{i}" for i in range(chance.choice([count, 2 * count]))]
    layers = []
    for number in chance.sample(range(1, 30), count):  # blocks.2 comes before blocks.10
        kind = chance.choice(["fc1", "fc1", "qk"])
        reads = chance.sample(tensors, 2) if kind == "qk" else [chance.choice(tensors)]
        layers.append(make_layer(f"blocks.{number}.{kind}", kind, chance.choice([8, 16]), chance.choice([10, 20]), reads))
    levels = [chance.choice([0.0, 1.0, 2.0]) for _ in range(3)]

    def row() -> tuple[float, ...]:
        level = chance.choice(levels)
        return tuple(level * 2.0 ** -(2 * max(width, chance.choice([2, 2, 3]))) for width in BITS)

    def falling() -> tuple[float, ...]:
        return tuple(sorted(row(), reverse=True))

    weighted = [layer.name for layer in layers if layer.has_weight]
    kinds: dict[str, Any] = {kind: {layer.name: falling() for layer in layers} for kind in ("tied", "activation")}
    table = CostTable(unit="nats", bits=BITS, weight={name: falling() for name in weighted}, **kinds)
    problem = Problem(make_profile(layers, table, 100), BITS, bits_apart, {})
    values = problem.measure(chance.choice(list(problem.assignments())))
    average = float(max(values["weight"], values["activation"]))
    budgets = [f"{average + 0.05:.2f}", f"size={int(values['size'])}B", f"bops={int(values['bops'])}"]
    return Problem(problem.profile, BITS, bits_apart, {}, chance.sample(budgets, chance.choice([1, 2])))


def from_the_top(assignment: Assignment) -> list[tuple[int, int]]:
    """The bits in order of name, numbers as numbers: all names are blocks.NUMBER.KIND."""
    names = sorted(assignment, key=lambda name: (int(name.split(".")[1]), name))
    return [(assignment[name][0] or 0, assignment[name][1]) for name in names]


@pytest.mark.parametrize("bits_apart", [False, True])
def test_the_plan_is_the_first_of_all_the_best(bits_apart: bool) -> None:
    several = []

    @settings(max_examples=150)
    @given(seed=st.integers(0, 2**40))
    def check(seed: int) -> None:
        problem = tied_problem(seed, bits_apart)
        within = [(problem.cost(found), from_the_top(found)) for found in problem.assignments() if problem.meets(found, problem.budgets)]
        best = [bits for cost, bits in within if cost == min(within)[0]]
        several.append(len(best) > 1)
        for profile in (problem.profile, reordered(problem.profile, seed)):
            allocation = allocate(profile, problem.budgets, **problem.options)
            chosen = {entry.name: (entry.weight_bits, entry.activation_bits) for entry in allocation.plan.layers}
            assert from_the_top(chosen) == max(best)
            assert (allocation.report["gap"], allocation.report["status"]) == (0, "optimal")
            assert allocation.report["objective"] == min(within)[0]

    check()
    assert sum(several) > len(several) / 3, "too few of the problems have ties"


def reordered(profile: Profile, seed: int) -> Profile:
    return profile.model_copy(update={"layers": tuple(random.Random(seed).sample(profile.layers, len(profile.layers)))})


@pytest.mark.parametrize("bits_apart", [False, True])
def test_of_layers_that_are_all_alike_the_first_have_the_most_bits(bits_apart: bool) -> None:
    """Twelve equal layers at an average of 3.5 bits: six at 4, then six at 3; apart, weights and inputs each."""
    layers = [make_layer(f"blocks.{i}.fc", "fc1", 10, 10, [f"t{i}"]) for i in range(12)]
    same = {layer.name: tuple(4.0**-width for width in BITS) for layer in layers}
    profile = make_profile(layers, CostTable(unit="nats", bits=BITS, tied=same, weight=same, activation=same))
    bits = [(entry.weight_bits, entry.activation_bits) for entry in allocate(profile, ["3.5"], bits_apart=bits_apart).plan.layers]
    assert bits == [(4, 4)] * 6 + [(3, 3)] * 6


def test_bits_that_a_budget_leaves_over_are_spent() -> None:
    layers = [make_layer(f"blocks.{i}.fc", "fc1", 10, 10, [f"t{i}"]) for i in range(3)]
    same = {layer.name: (1.0, 0.5, 0.5) for layer in layers}
    profile = make_profile(layers, CostTable(unit="nats", bits=BITS, tied=same, weight=same, activation=same))
    for budget, bits in (("4", [4, 4, 4]), ("3.5", [4, 3, 3]), ("3", [3, 3, 3])):
        assert [entry.weight_bits for entry in allocate(profile, [budget]).plan.layers] == bits


def test_a_search_that_stops_leaves_a_best_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = deit(192, 4)
    same = tuple(4.0**-width for width in BITS)
    table = make_table(layers, BITS, random.Random(0)).model_copy(update={"cross": {}})
    kinds = ("tied", "weight", "activation")
    profile = make_profile(layers, table.model_copy(update={kind: dict.fromkeys(getattr(table, kind), same) for kind in kinds}))
    first = allocate(profile, ["3.3", "like=4"], bits_apart=True).report
    whole = ties.search
    monkeypatch.setattr(ties, "search", lambda *given: whole(*given).__class__(None, 0.0, 0.0, False))
    stopped = allocate(profile, ["3.3", "like=4"], bits_apart=True).report
    assert stopped["objective"] == pytest.approx(first["objective"], rel=1e-12) and stopped["status"] == "optimal"


def test_a_bound_below_zero_leaves_out_no_option_of_the_best_plan() -> None:
    """Found by hypothesis: an option that costs more than the best plan had lowered the bound, and its clipping the excess allowed."""
    problem = tied_problem(10427655, True)
    within = [(problem.cost(found), from_the_top(found)) for found in problem.assignments() if problem.meets(found, problem.budgets)]
    allocation = allocate(problem.profile, problem.budgets, **problem.options)
    chosen = {entry.name: (entry.weight_bits, entry.activation_bits) for entry in allocation.plan.layers}
    assert from_the_top(chosen) == max(bits for cost, bits in within if cost == min(within)[0])
