"""Objectives against brute force of their definitions, written again here; presets against what their papers' table says."""

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from allocation_problems import Problem, deit, make_layer, make_profile, make_table, plain_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from vitq.allocation import allocate
from vitq.allocation.objectives import positive_semidefinite
from vitq.allocation.presets import PRESETS
from vitq.artifacts import CostTable, PairCost, Profile
from vitq.errors import BudgetError, UsageError

__all__ = ["plain_sizes"]  # a fixture for every test here
BITS = (2, 3, 4, 6)


def small_problem(seed: int, bits_apart: bool, count: int) -> tuple[Problem, random.Random]:
    """`count` linears and matmuls, some sharing a tensor, the last one fixed."""
    chance = random.Random(seed)
    layers = []
    for position in range(count):
        reads = [f"t{chance.randrange(2 * count)}"] if chance.random() < 0.7 else [f"x{position}", f"y{position}"]
        layers.append(make_layer(f"l{position}", "fc1", chance.randint(1, 200), chance.randint(1, 500), reads, chance.randint(1, 9)))
    layers.append(make_layer("head", "head", 50, 60, ["h"]))
    bits = tuple(sorted(chance.sample(BITS, 3)))
    table = make_table(layers, bits, chance).model_copy(
        update={"importance": {layer.name: chance.lognormvariate(0, 2) for layer in layers}}
    )
    return Problem(make_profile(layers, table, 100), bits, bits_apart, {"head": (8, 8)}), chance


def budgets_for(problem: Problem, chance: random.Random) -> list[str]:
    values = problem.measure(chance.choice(list(problem.assignments())))
    size, bops = math.floor(values["size"]), math.floor(values["bops"])
    average = math.ceil(max(values["weight"], values["activation"]) * 100) / 100
    return chance.choice([[f"bops={bops}"], [f"size={size}B", f"bops={bops}"], [f"{average}", f"bops={bops}"]])


def best_of(problem: Problem, budgets: list[str], cost: Any) -> float:
    return min(cost(assignment) for assignment in problem.assignments() if problem.meets(assignment, budgets))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**40), bits_apart=st.booleans(), gamma=st.sampled_from([1.5, 2.0, 4.0]))
def test_gamma_is_as_good_as_brute_force(seed: int, bits_apart: bool, gamma: float) -> None:
    problem, chance = small_problem(seed, bits_apart, 3 if bits_apart else 5)
    importance = problem.profile.costs["random"].importance

    def cost(assignment: Any) -> float:
        halves = [(a if w is None else w, a, importance[name] / 2) for name, (w, a) in assignment.items()]
        return math.fsum(half * gamma**-width for w, a, half in halves for width in (w, a))

    budgets = budgets_for(problem, chance)
    report = allocate(problem.profile, budgets, objective="gamma", gamma=gamma, **problem.options).report
    assert report["objective"] == pytest.approx(best_of(problem, budgets, cost), rel=1e-9)
    assert report["gap"] == 0


def test_gamma_with_tied_widths_is_lampqs_sum() -> None:
    problem, _ = small_problem(0, False, 5)
    importance = problem.profile.costs["random"].importance
    found = allocate(problem.profile, uniform="4", objective="gamma", bits=problem.bits).report["objective"]
    assert found == pytest.approx(sum(importance[f"l{i}"] * 4.0**-4 for i in range(5)) + importance["head"] * 4.0**-8)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**40))
def test_mix_qvit_solves_the_quadratic_program(seed: int) -> None:
    """Weights x and activations y as vectors of binaries, BitOps as the quadratic form x^T M y, every pair of vectors tried."""
    chance = random.Random(seed)
    layers = [make_layer(f"l{i}", "fc1", 10, chance.randint(1, 500), [f"t{i}"]) for i in range(3)]
    bits = tuple(sorted(chance.sample(BITS, 3)))
    widths, count = np.array(bits, float), len(bits)
    table = make_table(layers, bits, chance)
    weight, activation = (np.concatenate([kind[layer.name] for layer in layers]) for kind in (table.weight, table.activation))
    form = np.zeros((3 * count, 3 * count))
    for i, layer in enumerate(layers):
        form[i * count : (i + 1) * count, i * count : (i + 1) * count] = layer.macs * np.outer(widths, widths)
    vectors = []
    for choice in itertools.product(range(count), repeat=3):
        vector = np.zeros(3 * count)
        vector[[i * count + at for i, at in enumerate(choice)]] = 1
        vectors.append(vector)
    limit = chance.choice([x @ form @ y for x in vectors for y in vectors])
    best = min(weight @ x + activation @ y for x in vectors for y in vectors if x @ form @ y <= limit)
    profile = make_profile(layers, table)
    report = allocate(profile, [f"bops={int(limit)}"], objective="mix-qvit", bits_apart=True).report
    assert report["objective"] == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert report["bops"] <= limit


def with_pairs(profile: Profile, chance: random.Random, definite: bool) -> Profile:
    """Terms between some layers; `definite`: the whole matrix is positive semidefinite and needs no repair."""
    table = profile.costs["random"]
    names, count = [layer.name for layer in profile.layers], len(table.bits)
    if definite:
        root = np.array([[chance.gauss(0, 1) * 3.0 ** -table.bits[i % count] for i in range(len(names) * count)] for _ in range(3)])
        matrix = root.T @ root
        tied = {name: tuple(np.diag(matrix)[i * count : (i + 1) * count].tolist()) for i, name in enumerate(names)}
        table = table.model_copy(update={"tied": tied})
    pairs = []
    for i, j in itertools.combinations(range(len(names)), 2):
        if not definite and chance.random() < 0.4:
            continue
        if definite:
            costs = 2 * matrix[i * count : (i + 1) * count, j * count : (j + 1) * count]
        else:
            costs = np.array([[chance.uniform(-1, 1) * 3.0 ** -(a + b) for b in table.bits] for a in table.bits])
        first, second = (names[i], names[j]) if chance.random() < 0.5 else (names[j], names[i])
        pairs.append(PairCost(first=first, second=second, costs=(costs if first == names[i] else costs.T).tolist()))
    chance.shuffle(pairs)
    return profile.model_copy(update={"costs": {"random": CostTable.model_validate(table.model_dump() | {"pairs": pairs})}})


def quadratic(profile: Profile) -> tuple[np.ndarray, dict[str, int]]:
    """The repaired matrix by its definition: tied costs on the diagonal, half of each pair on either side, negative eigenvalues at 0."""
    table = profile.costs["random"]
    start = {name: i * len(table.bits) for i, name in enumerate(sorted(table.tied))}
    matrix = np.zeros((len(start) * len(table.bits),) * 2)
    for name, at in start.items():
        for i, cost in enumerate(table.tied[name]):
            matrix[at + i, at + i] = cost
    for pair in table.pairs:
        for i, row in enumerate(pair.costs):
            for j, cost in enumerate(row):
                one, other = start[pair.first] + i, start[pair.second] + j
                matrix[one, other] += cost / 2
                matrix[other, one] += cost / 2
    values, vectors = np.linalg.eigh(matrix)
    return sum(max(value, 0.0) * np.outer(vector, vector) for value, vector in zip(values, vectors.T, strict=True)), start


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**40), definite=st.booleans())
def test_pairwise_is_as_good_as_brute_force_of_the_repaired_form(seed: int, definite: bool) -> None:
    problem, chance = small_problem(seed, False, 5)
    problem = Problem(with_pairs(problem.profile, chance, definite), problem.bits, False, problem.fixed)
    matrix, start = quadratic(problem.profile)
    bits = problem.bits

    def cost(assignment: Any) -> float:
        x = np.zeros(len(matrix))
        x[[start[name] + max(i for i, width in enumerate(bits) if width <= a) for name, (_, a) in assignment.items()]] = 1
        return float(x @ matrix @ x)

    budgets = budgets_for(problem, chance)
    allocation = allocate(problem.profile, budgets, objective="pairwise", **problem.options)
    chosen = {entry.name: (entry.weight_bits, entry.activation_bits) for entry in allocation.plan.layers}
    scale = np.abs(matrix).max()
    assert allocation.report["objective"] == pytest.approx(best_of(problem, budgets, cost), rel=1e-7, abs=1e-10 * scale)
    assert cost(chosen) == pytest.approx(allocation.report["objective"], rel=1e-7, abs=1e-10 * scale)
    assert problem.meets(chosen, budgets)
    assert (allocation.report["gap"], allocation.report["status"]) == (0, "optimal")


def test_a_matrix_is_repaired_only_where_it_must_be() -> None:
    definite = np.array([[2.0, 1.0], [1.0, 2.0]])
    assert positive_semidefinite(definite) is definite
    repaired = positive_semidefinite(np.array([[1.0, 2.0], [2.0, 1.0]]))
    assert repaired == pytest.approx(np.full((2, 2), 1.5)), "eigenvalues 3 and -1 with vectors (1, 1) and (1, -1)"


def test_pairwise_ignores_the_order_of_pairs_and_layers() -> None:
    problem, chance = small_problem(3, False, 5)
    profile = with_pairs(problem.profile, chance, False)
    table = profile.costs["random"]
    turned = [PairCost(first=p.second, second=p.first, costs=np.array(p.costs).T.tolist()) for p in reversed(table.pairs)]
    other = profile.model_copy(
        update={"layers": profile.layers[::-1], "costs": {"random": table.model_copy(update={"pairs": tuple(turned)})}}
    )
    plans = [allocate(p, ["3.4"], objective="pairwise", bits=problem.bits).plan for p in (profile, other)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "best"}, "objective 'best' is not known; give one of sum, gamma, mix-qvit, pairwise"),
        ({"objective": "gamma"}, "objective gamma needs one importance a layer, which this metric does not give"),
        ({"objective": "pairwise"}, "objective pairwise needs terms between layers, which this metric does not give"),
        ({"gamma": 4.0}, "--gamma has no meaning for objective 'sum'"),
        ({"objective": "gamma", "gamma": 1.0}, "--gamma 1 cannot be used: .* a number above 1"),
        ({"preset": "hawq"}, "preset 'hawq' is not known; give one of lampq, mix-qvit, lrp-qvit"),
        ({"preset": "lampq"}, "preset 'lampq' minimises metric 'lampq', .* has random.; run `vitq profile --metric lampq` first"),
        ({"preset": "lrp-qvit"}, "run `vitq profile --metric lrp` first"),
    ],
)
def test_objectives_and_presets_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    layers = deit(192, 1)
    with pytest.raises(UsageError, match=message):
        allocate(make_profile(layers, make_table(layers, BITS, random.Random(0))), ["4.0"], **options)


def test_pairs_are_for_tied_widths() -> None:
    problem, chance = small_problem(3, True, 3)
    with pytest.raises(UsageError, match="objective pairwise is for tied widths"):
        allocate(with_pairs(problem.profile, chance, True), ["4.0"], objective="pairwise", bits_apart=True, bits=problem.bits)


@pytest.fixture
def papers() -> Profile:
    """A profile with the metrics of all presets, at all widths."""
    layers = deit(192, 2)
    table = make_table(layers, (2, 3, 4, 5, 6, 7, 8), random.Random(0))
    importance = {layer.name: random.Random(layer.name).lognormvariate(0, 1) for layer in layers}
    tables = {name: table.model_copy(update={"importance": importance}) for name in ("output-fisher", "lampq", "mix-qvit", "lrp")}
    return make_profile(layers, table).model_copy(update={"costs": tables})


@pytest.mark.parametrize(
    ("preset", "budget", "metric", "objective", "bits"),
    [
        ("lampq", "like=4", "lampq", "gamma", [2, 3, 4, 5, 6]),
        ("lampq", "like=3", "lampq", "gamma", [2, 3, 4, 5]),
        ("mix-qvit", "like=4", "mix-qvit", "mix-qvit", [3, 4, 5, 6]),
        ("mix-qvit", "like=8", "mix-qvit", "mix-qvit", [7, 8]),
        ("lrp-qvit", "4.0", "lrp", "gamma", [3, 4, 5, 6]),
        ("lrp-qvit", "bops=1000G", "lrp", "gamma", [2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_a_preset_is_its_papers_metric_objective_and_bits(
    papers: Profile, preset: str, budget: str, metric: str, objective: str, bits: list[int]
) -> None:
    asked = allocate(papers, [budget], preset=preset).plan.made_from["allocation"]
    assert (asked["metric"], asked["objective"], asked["bits"], asked["preset"]) == (metric, objective, bits, preset)


def test_explicit_options_win_over_a_preset(papers: Profile) -> None:
    plan = allocate(papers, ["like=4"], preset="lampq", metric="lrp", objective="sum", bits=[2, 4, 8]).plan
    asked = plan.made_from["allocation"]
    assert (asked["metric"], asked["objective"], asked["bits"]) == ("lrp", "sum", [2, 4, 8])
    assert allocate(papers, ["like=4"], preset="lampq", gamma=2.0).plan.made_from["allocation"]["gamma"] == 2.0


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_when_its_bits_do_not_reach_the_budget(papers: Profile, preset: str) -> None:
    with pytest.raises(BudgetError, match="cannot be met"):
        allocate(papers, ["like=8", "size=1KB"], preset=preset)
