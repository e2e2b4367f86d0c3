"""What is proven about a plan and said beside it: gap and status, shadow prices, the staircase of optimal plans."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from allocation_problems import deit, make_layer, make_profile, make_table, plain_sizes
from cli_session import vitq

import vitq.allocation.solver as solver
from vitq.allocation import allocate, as_json, draw, pareto
from vitq.artifacts import CostTable, Layer, Profile, save
from vitq.errors import UsageError

__all__ = ["plain_sizes"]  # a fixture for every test here
BITS = (2, 3, 4, 5, 6, 7, 8)


def smooth_profile(layers: list[Layer], seed: int = 0) -> Profile:
    """Costs that fall evenly with the width, without ties: one more bit is worth less everywhere."""
    chance = random.Random(seed)

    def row() -> tuple[float, ...]:
        level, ratio = chance.lognormvariate(-7, 1), chance.uniform(3, 4.5)
        return tuple(level * ratio ** -(width - 2) for width in BITS)

    kinds: dict[str, Any] = {kind: {layer.name: row() for layer in layers} for kind in ("tied", "activation")}
    kinds["weight"] = {layer.name: row() for layer in layers if layer.has_weight}
    return make_profile(layers, CostTable(unit="nats", bits=BITS, **kinds), rest_bytes=10**6)


PROFILE = smooth_profile(deit(192))


@pytest.mark.parametrize(
    ("budget", "wider", "quantity", "units"),
    [("3.5/8", "3.6/8", "average weight bits", 0.1), ("size=3.6MB", "size=3.7MB", "size", 0.1), ("bops=18G", "bops=19G", "BitOps", 1)],
)
def test_a_shadow_price_is_what_a_little_more_of_the_budget_buys(budget: str, wider: str, quantity: str, units: float) -> None:
    report, more = (allocate(PROFILE, [text], bits_apart=True).report for text in (budget, wider))
    (price,) = (price for price in report["shadow_prices"] if price["quantity"] == quantity)
    bought = report["objective"] - more["objective"]
    (after,) = (price for price in more["shadow_prices"] if price["quantity"] == quantity)
    # The optimum is convex in the budget but for whole widths, so what was bought lies between the prices at both ends.
    assert after["per_unit"] * units * 0.95 <= bought <= price["per_unit"] * units * 1.05
    assert price["buys"] == pytest.approx(price["per_unit"] * price["step"])
    assert f"more buys {price['buys']:.2g} nats; the cheapest layer to raise is {price['raise']['layer']}" in price["text"]


def test_the_cheapest_layer_is_the_best_of_all_single_raises() -> None:
    allocation = allocate(PROFILE, ["3.5"])
    table, layers = PROFILE.costs["random"], {layer.name: layer for layer in PROFILE.layers}
    rates = {}
    for entry in allocation.plan.layers:
        at = BITS.index(entry.activation_bits)
        if entry.name not in allocation.plan.fixed and at + 1 < len(BITS):
            saved = table.tied[entry.name][at] - table.tied[entry.name][at + 1]
            rates[entry.name] = saved / layers[entry.name].macs
    (price,) = (price for price in allocation.report["shadow_prices"] if price["quantity"] == "average activation bits")
    best = max(rates, key=lambda name: rates[name])
    before = allocation.plan.bits[best].activation_bits
    assert price["raise"] == {"layer": best, "from": before, "to": before + 1}


def test_a_budget_that_does_not_bind_has_no_price() -> None:
    prices = allocate(PROFILE, ["3.5", "size=999MB"]).report["shadow_prices"]
    assert [(price["quantity"], price["text"]) for price in prices if not price["per_unit"]][-1] == (
        "size",
        "does not bind: more of it buys nothing",
    )
    assert allocate(PROFILE, uniform="4").report["shadow_prices"] == []


def test_an_average_that_is_tied_to_another_says_so() -> None:
    """Activations at 3 hold all widths down, also those of weights, unless these are chosen apart: then each average has its price."""
    tied, apart = (allocate(PROFILE, ["6/3"], bits_apart=bits_apart).report for bits_apart in (False, True))
    (left,) = (price for price in tied["shadow_prices"] if not price["per_unit"])
    why = "weights and activations have one width a layer, and average activation bits binds"
    assert (left["quantity"], left["text"]) == ("average weight bits", f"does not bind: more of it buys nothing, as {why}")
    assert tied["average_weight_bits"] < 6
    assert all(price["per_unit"] for price in apart["shadow_prices"])


def test_a_stopped_search_says_so_and_its_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hardly any work allowed the gap is not closed; the bound that is claimed lies below the true optimum all the same."""
    profile = make_profile(deit(), make_table(deit(), BITS, random.Random(4)), rest_bytes=10**6)
    options: dict[str, Any] = {"budgets": ["3.3", "like=3"], "bits_apart": True}
    optimum = allocate(profile, **options).report
    assert (optimum["gap"], optimum["status"]) == (0, "optimal")
    monkeypatch.setattr(solver, "WORK", 1)
    monkeypatch.setattr(solver, "QUICK_NODES", 1)
    stopped = allocate(profile, **options).report
    assert stopped["status"] == "stopped at the limit of work" and stopped["gap"] > 0
    assert stopped["bound"] <= optimum["objective"] <= stopped["objective"]
    rough = allocate(profile, gap=0.01, **options).report
    assert rough["status"] == "optimal" and rough["gap"] <= 0.01
    assert rough["bound"] <= optimum["objective"] <= rough["objective"]


def test_five_hundred_layers_with_three_budgets_to_a_gap_of_1e_4() -> None:
    """500 layers x 49 pairs; the figures are those of `examples/allocation_speed.py`, here only with time to spare."""
    chance = random.Random(0)
    layers = [
        make_layer(f"l{i}", "fc1", 64 * chance.randrange(200, 50_000), chance.randrange(10**6, 6 * 10**8), [f"t{i}"], 768)
        for i in range(500)
    ]
    profile = smooth_profile(layers)
    uniform = allocate(profile, uniform="4", bits_apart=True).report
    budgets = ["4.0", f"size={int(uniform['size_bytes'] * 0.95)}B", f"bops={int(uniform['bops'] * 0.9)}"]
    report = allocate(profile, budgets, bits_apart=True, gap=1e-4).report
    assert report["gap"] <= 1e-4 and report["solve_seconds"] < 30


def test_the_staircase_holds_the_optimum_of_every_average() -> None:
    profile = smooth_profile(deit(192, 2))
    staircase = pareto(profile)
    assert {"format", "metric", "objective", "unit", "bits_apart", "plans", "uniform"} == set(staircase)
    plans = staircase["plans"]
    assert (plans[0]["budget"], plans[-1]["objective"]) == (2, pytest.approx(allocate(profile, uniform="8").report["objective"]))
    assert [plan["budget"] for plan in plans] == sorted({plan["budget"] for plan in plans})
    for earlier, later in itertools.pairwise(plans):
        assert later["objective"] < earlier["objective"]
    for average in ("2.5", "3.3", "4.0", "6.1"):
        report = allocate(profile, [average]).report
        step = max((plan for plan in plans if plan["budget"] <= float(average)), key=lambda plan: plan["budget"])
        assert step["objective"] == pytest.approx(report["objective"], rel=1e-3)
        assert max(step["average_weight_bits"], step["average_activation_bits"]) <= float(average)
    assert all(plan["gap"] <= 1e-3 for plan in plans)
    assert [plan["budget"] for plan in staircase["uniform"]] == list(BITS)
    reverse = profile.model_copy(update={"layers": profile.layers[::-1]})
    assert as_json(pareto(reverse)) == as_json(staircase)
    pytest.importorskip("matplotlib")
    assert draw(staircase, "svg") == draw(json.loads(as_json(staircase)), "svg")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"the plot needs matplotlib, .*pip install 'vitq\[plots\]'"):
        draw({}, "svg")


def test_the_command_shows_prices_and_writes_the_staircase(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save(smooth_profile(deit(192, 1)), tmp_path / "profile.json")
    chosen = vitq("allocate", "profile.json", "--budget", "3.5", folder=tmp_path)
    assert chosen.code == 0, chosen.err
    assert "more buys" in chosen.out and "the cheapest layer to raise is blocks.0." in chosen.out
    alone = vitq("allocate", "profile.json", "--pareto", "stairs.json", folder=tmp_path)
    assert alone.code == 0, alone.err
    assert "wrote stairs.json and stairs.svg" in alone.out
    assert len(json.loads((tmp_path / "stairs.json").read_text())["plans"]) > 10
    assert (tmp_path / "stairs.svg").read_text().startswith("<?xml")
    again = vitq("allocate", "profile.json", "--pareto", "stairs.json", folder=tmp_path)
    assert again.code == 2 and "stairs.json exists already" in again.err
    wrong = vitq("allocate", "profile.json", "--pareto", "stairs.png", folder=tmp_path)
    assert wrong.code == 2 and "give a name that ends in .json" in wrong.err
    document = vitq("allocate", "profile.json", "--budget", "3.5", "--json", "--force", folder=tmp_path).document
    assert [price["quantity"] for price in document["shadow_prices"]] == ["average weight bits", "average activation bits"]


def test_the_plan_file_is_the_same_whatever_the_order_of_the_profile(tmp_path: Path) -> None:
    profile = smooth_profile(deit(192))
    table = profile.costs["random"]
    turned = {kind: dict(reversed(getattr(table, kind).items())) for kind in ("tied", "weight", "activation")}
    other = profile.model_copy(update={"layers": profile.layers[::-1], "costs": {"random": table.model_copy(update=turned)}})
    for name, which in (("a", profile), ("b", other)):
        save(which, tmp_path / name / "profile.json")
        assert vitq("allocate", "--budget", "3.5", "--budget", "like=4", "--run-dir", name, folder=tmp_path).code == 0
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()


def test_the_expected_loss_is_what_each_halfs_plan_costs_by_the_other():
    """By brute force over all plans of four layers at two widths."""
    layers = tuple(make_layer(f"layer{index}", "fc1", 100, 100, [f"x{index}"]) for index in range(4))
    source = random.Random(3)

    def table(**more) -> CostTable:
        costs = {layer.name: (2 + source.random(), source.random()) for layer in layers}
        return CostTable(unit="nats", bits=(2, 4), tied=costs, weight=costs, activation=costs, **more)

    halves = (table(), table())
    mean = {name: tuple(sum(pair) / 2 for pair in zip(costs, halves[1].tied[name], strict=True)) for name, costs in halves[0].tied.items()}
    whole = CostTable(unit="nats", bits=(2, 4), tied=mean, weight=mean, activation=mean, halves=halves)
    plans = [plan for plan in itertools.product((0, 1), repeat=4) if sum(plan) <= 2]  # 3.0 bits on average

    def cost(prices: CostTable, plan: tuple[int, ...]) -> float:
        return sum(prices.tied[layer.name][at] for layer, at in zip(layers, plan, strict=True))

    best = [min(plans, key=lambda plan, half=half: cost(half, plan)) for half in halves]
    expected = (cost(halves[1], best[0]) + cost(halves[0], best[1])) / 2
    found = allocate(make_profile(layers, whole), ["3.0"]).report
    assert found["predicted"] == pytest.approx(expected) and best[0] != best[1]
    assert found["predicted"] > found["objective"] == pytest.approx(min(cost(whole, plan) for plan in plans))
    alone = whole.model_copy(update={"halves": ()})
    assert allocate(make_profile(layers, alone), ["3.0"]).report["predicted"] == found["objective"]
    assert allocate(make_profile(layers, whole), uniform="4").report["predicted"] == pytest.approx(cost(whole, (1, 1, 1, 1)))
