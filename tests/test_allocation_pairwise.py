"""Plans where pairs of options cost something together: the bound below and the plan above every plan's cost, by brute force."""

import itertools
import random

import numpy as np
import pytest
from allocation_problems import make_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from vitq.allocation import pairwise
from vitq.allocation.choices import Choice, ChoiceTree, Widths
from vitq.allocation.convex import tangent
from vitq.allocation.pairwise import solve_with_products
from vitq.allocation.solver import Row, meets
from vitq.allocation.swaps import swap


def coupled(seed: int, definite: bool) -> tuple[ChoiceTree, np.ndarray, list[Row]]:
    """Four or five choices of one to four options, a form over all of them, and one or two rows that some plan meets."""
    chance = random.Random(seed)
    counts = [chance.randint(1, 4) for _ in range(chance.randint(4, 5))]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    layer = make_layer("l", "fc1", 1, 1, ["t"])
    tree = ChoiceTree(
        tuple((Widths(layer, 2, 2),) for _ in range(sum(counts))),
        tuple(Choice(tuple(range(start, start + count)), None) for start, count in zip(starts, counts, strict=True)),
    )
    numbers = np.random.default_rng(seed)
    form = numbers.normal(size=(len(tree.options), len(tree.options)))
    form = form @ form.T if definite else form + form.T
    some = {chance.choice(choice.options) for choice in tree.choices}
    rows = []
    for _ in range(chance.randint(1, 2)):
        amounts = tuple(chance.randint(0, 9) for _ in tree.options)
        rows.append(Row(amounts, sum(amounts[option] for option in some) + chance.randint(0, 3)))
    return tree, form, rows


def plans(tree: ChoiceTree, rows: list[Row]) -> list[tuple[int, ...]]:
    every = itertools.product(*(choice.options for choice in tree.choices))
    return [plan for plan in every if meets(tree, rows, plan)]


def cost(form: np.ndarray, plan: tuple[int, ...]) -> float:
    return float(form[np.ix_(plan, plan)].sum())


def products_of(tree: ChoiceTree, form: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    pairs = itertools.combinations(range(len(tree.choices)), 2)
    return {(i, j): 2 * form[np.ix_(tree.choices[i].options, tree.choices[j].options)] for i, j in pairs}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), definite=st.booleans())
def test_no_plan_is_below_the_tangents_bound(seed: int, definite: bool) -> None:
    tree, form, rows = coupled(seed, definite)
    least = min(cost(form, plan) for plan in plans(tree, rows))
    bound, _ = tangent(tree, form, rows)
    assert bound <= least + 1e-6 * np.abs(form).max()


def test_the_tangents_bound_is_tight_where_the_form_is_separable_and_no_budget_binds() -> None:
    tree, form, rows = coupled(5, True)
    form = np.diag(np.diag(form))
    loose = [Row(row.amounts, sum(row.amounts)) for row in rows]
    assert tangent(tree, np.zeros_like(form), loose)[0] == 0
    bound, costs = tangent(tree, form, loose)
    assert 0 < bound <= sum(form[choice.options, choice.options].min() for choice in tree.choices)
    assert np.isfinite(costs).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), definite=st.booleans())
def test_no_change_of_two_choices_improves_a_swapped_plan(seed: int, definite: bool) -> None:
    tree, form, rows = coupled(seed, definite)
    every = plans(tree, rows)
    start = random.Random(seed).choice(every)
    found = swap(tree, form, rows, start)
    assert meets(tree, rows, found) and cost(form, found) <= cost(form, start) + 1e-9
    near = [plan for plan in every if len(set(plan) - set(found)) <= 2]
    assert cost(form, found) == pytest.approx(min(cost(form, plan) for plan in near), abs=1e-9 * np.abs(form).sum())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), definite=st.booleans())
def test_too_many_products_end_with_a_true_gap(seed: int, definite: bool) -> None:
    tree, form, rows = coupled(seed, definite)
    costs, products = np.diag(form).tolist(), products_of(tree, form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise, "PRODUCTS", 0)
        found = solve_with_products(tree, costs, products, rows)
    proven = solve_with_products(tree, costs, products, rows)
    assert found is not None and proven is not None
    least, scale = min(cost(form, plan) for plan in plans(tree, rows)), np.abs(form).max()
    assert found.objective == pytest.approx(cost(form, found.taken))
    assert found.bound <= least + 1e-6 * scale and least <= found.objective + 1e-9 * scale
    assert proven.objective == pytest.approx(least, abs=1e-6 * scale)
    assert proven.status == "optimal"


def test_rows_that_exclude_each_other_have_no_plan() -> None:
    layer = make_layer("l", "fc1", 1, 1, ["t"])
    tree = ChoiceTree(tuple((Widths(layer, 2, 2),) for _ in range(4)), (Choice((0, 1), None), Choice((2, 3), None)))
    form = np.eye(4) + 0.1
    rows = [Row((1, 0, 0, 0), 0), Row((0, 1, 0, 0), 0)]
    assert solve_with_products(tree, np.diag(form).tolist(), products_of(tree, form), rows) is None
    assert solve_with_products(tree, np.diag(form).tolist(), products_of(tree, form), rows[:1]) is not None
