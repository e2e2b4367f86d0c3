"""Budgets, fixed layers, the report and the messages of `allocate`, against numbers worked out by hand."""

import json
import random
import re
from typing import Any

import pytest
from allocation_problems import deit, make_layer, make_profile, make_table, plain_sizes

from vitq.allocation import Allocation, allocate
from vitq.allocation.budgets import BUDGETS, Whole, parse_budget
from vitq.allocation.choices import settle
from vitq.allocation.sizes import stored_bytes
from vitq.artifacts import WIDTHS, CostTable, Profile
from vitq.errors import BudgetError, InputError, UsageError
from vitq.latency import LatencyTable

__all__ = ["plain_sizes"]  # a fixture for every test here
BITS = (2, 3, 4, 6, 8)
LAYERS = (
    make_layer("embed", "patch_embed", 100, 1000, ["image"], channels=10),
    make_layer("b.q", "q", 300, 3000, ["n"], channels=30),
    make_layer("b.k", "k", 100, 1000, ["n"], channels=10),
    make_layer("b.qk", "qk", 0, 500, ["qo", "ko"]),
    make_layer("head", "head", 50, 50, ["c"], channels=5),
)
PROFILE = make_profile(LAYERS, make_table(LAYERS, BITS, random.Random(3)), rest_bytes=1000)


def widths(allocation: Allocation) -> dict[str, tuple[int | None, int]]:
    return {entry.name: (entry.weight_bits, entry.activation_bits) for entry in allocation.plan.layers}


def test_the_report_of_uniform_bits_by_hand() -> None:
    allocation = allocate(PROFILE, uniform="4/6")
    assert widths(allocation) == {"embed": (8, 8), "b.q": (4, 6), "b.k": (4, 6), "b.qk": (None, 6), "head": (8, 8)}
    report = allocation.report
    assert set(report) == {
        *("average_weight_bits", "average_activation_bits", "average_weight_bits_all", "average_activation_bits_all", "size_bytes", "bops"),
        *("objective", "bound", "gap", "status", "predicted", "solve_seconds", "relative_to_uniform", "shadow_prices"),
    }
    assert (report["average_weight_bits"], report["average_activation_bits"]) == (4, 6)
    assert report["average_weight_bits_all"] == pytest.approx((150 * 8 + 400 * 4) / 550)
    assert report["average_activation_bits_all"] == pytest.approx((1050 * 8 + 4500 * 6) / 5550)
    assert report["bops"] == 1050 * 64 + 4000 * 4 * 6 + 500 * 36
    # rest, graph of 5 layers, codes, then scales (and zero points below 8 bits) of 15 and 40 channels
    assert report["size_bytes"] == 1000 + 5 * 700 + (150 + 400 // 2) + 15 * 4 + 40 * 5
    assert report["relative_to_uniform"] == {"weight_bits": 4, "activation_bits": 6, "size": 1, "bops": 1}
    assert (report["gap"], report["bound"], report["status"], report["solve_seconds"]) == (0, report["objective"], "uniform", 0)
    json.dumps(report, allow_nan=False)


def test_the_objective_of_uniform_bits_is_the_sum_of_tied_costs_and_apart_of_the_others() -> None:
    table = PROFILE.costs["random"]
    at = BITS.index(4)
    expected = sum(table.tied[name][-1] for name in ("embed", "head")) + sum(table.tied[name][at] for name in ("b.q", "b.k", "b.qk"))
    assert allocate(PROFILE, uniform="4").report["objective"] == pytest.approx(expected)
    apart = table.activation["b.qk"][at]
    for name, column in (("embed", -1), ("head", -1), ("b.q", at), ("b.k", at)):
        apart += table.weight[name][column] + table.activation[name][column] + table.cross[name][column][column]
    assert allocate(PROFILE, uniform="4", bits_apart=True).report["objective"] == pytest.approx(apart)


def test_stored_bytes_round_codes_up_and_count_zero_points_below_eight_bits() -> None:
    layer = make_layer("l", "fc1", 7, 1, ["t"], channels=3)
    assert [stored_bytes(layer, bits, 8) - 700 for bits in (2, 3, 7, 8)] == [2 + 15, 3 + 15, 7 + 15, 7 + 12]
    assert stored_bytes(LAYERS[3], None, 4) == 700


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("4.0", [("average weight bits", 1600), ("average activation bits", 18000)]),
        ("3.3333/8", [("average weight bits", 1333), ("average activation bits", 36000)]),
        (" 4 ", [("average weight bits", 1600), ("average activation bits", 18000)]),
        ("size=3.2MB", [("size", 3_200_000 - 1000)]),
        ("size=2000.9b", [("size", 1000)]),
        ("size=5 KB", [("size", 4000)]),
        ("size=0.001GB", [("size", 999_000)]),
        ("bops=1.5G", [("BitOps", 1_500_000_000)]),
        ("bops=12345", [("BitOps", 12345)]),
        ("bops=0.5k", [("BitOps", 500)]),
        ("like=4", [("size", 5 * 700 + 150 + 200 + 60 + 200), ("BitOps", 1050 * 64 + 4500 * 16)]),
        ("like=4/6", [("size", 5 * 700 + 150 + 200 + 60 + 200), ("BitOps", 1050 * 64 + 4000 * 24 + 500 * 36)]),
    ],
)
def test_a_budget_is_read_into_exact_limits(text: str, limits: list[tuple[str, int]]) -> None:
    budgets = parse_budget(text, settle(LAYERS, []), Whole(PROFILE.rest_bytes))
    assert [(budget.quantity, budget.limit) for budget in budgets] == limits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("four", "budget 'four': 'four' is not a decimal number; give average bits"),
        ("", "budget '': '' is not a decimal number"),
        ("-4", "'-4' is not a decimal number"),
        ("nan", "'nan' is not a decimal number"),
        ("1e3", "'1e3' is not a decimal number"),
        ("4/", "budget '4/': '' is not a decimal number"),
        ("4/8/2", "'8/2' is not a decimal number"),
        ("٤", "is not a decimal number"),
        ("size=3.2", "unit 'none' is not known; give one of B, KB, MB, GB"),
        ("size=3MiB", "unit 'MiB' is not known; give one of B, KB, MB, GB"),
        ("size=MB", "'' is not a decimal number"),
        ("size=", "unit 'none' is not known"),
        ("bops=1.5GB", "unit 'GB' is not known; give one of none, K, M, G, T"),
        ("like=4.5", "budget 'like=4.5': '4.5' is not a width; give whole bits from 2 to 8"),
        ("like=9", "'9' is not a width"),
        ("latency=4", "unit 'none' is not known; give one of us, ms, s"),
        ("latency=fast ms", "'fast' is not a decimal number; give average bits .* size=3.2MB, bops=1.5G, like=4 or latency=4.0ms"),
        ("memory=3MB", "budget 'memory=3MB' is of no known kind; give average bits"),
    ],
)
def test_a_budget_that_is_not_understood_is_a_usage_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        allocate(PROFILE, [text])


def test_every_kind_of_budget_is_kept_and_reached() -> None:
    """Each kind's own limit binds: the plan is within it, and a wider budget buys a lower cost."""
    cases = [("size=5.1KB", "size=5.2KB", "size_bytes"), ("bops=130K", "bops=900K", "bops"), ("like=3", "like=6", "bops")]
    cases.append(("latency=0.6ms", "latency=1.1ms", "latency_ms"))
    for tight, wide, key in cases:
        first, second = (allocate(PROFILE, [text], latencies=slower_with_the_width()).report for text in (tight, wide))
        assert first[key] <= second[key] and first["objective"] > second["objective"], tight
    assert {text.partition("=")[0] for text, _, _ in cases} == set(BUDGETS)


def slower_with_the_width() -> LatencyTable:
    """Every layer takes 0.02 ms a bit of its activations, everything else 0.1 ms."""
    timings = [
        {"layers": [layer.name], "weight_bits": WIDTHS if layer.has_weight else None, "activation_bits": [width], "ms": 0.02 * width}
        for layer in LAYERS
        for width in WIDTHS
    ]
    return LatencyTable.model_validate(
        {"architecture": "none", "graph_digest": "", "batch": 1, "threads": 1, "rest_ms": 0.1, "timings": timings}
    )


def test_relative_to_uniform_is_interpolated_between_whole_widths() -> None:
    """At 3.5/3.5 the uniform plan lies half way between 3 and 4 in weights and in activations."""
    report = allocate(PROFILE, ["3.5"]).report
    corners = [allocate(PROFILE, uniform=text).report for text in ("3/3", "3/4", "4/3", "4/4")]
    relative = report["relative_to_uniform"]
    assert (relative["weight_bits"], relative["activation_bits"]) == (3.5, 3.5)
    assert relative["size"] == pytest.approx(report["size_bytes"] / (sum(corner["size_bytes"] for corner in corners) / 4))
    assert relative["bops"] == pytest.approx(report["bops"] / (sum(corner["bops"] for corner in corners) / 4))


def test_without_an_average_budget_the_achieved_averages_are_compared() -> None:
    report = allocate(PROFILE, ["size=5.1KB"], bits_apart=True).report
    relative = report["relative_to_uniform"]
    assert (relative["weight_bits"], relative["activation_bits"]) == (report["average_weight_bits"], report["average_activation_bits"])
    beyond = allocate(PROFILE, ["20"]).report
    assert beyond["relative_to_uniform"] == {"weight_bits": 8, "activation_bits": 8, "size": 1, "bops": 1}


def test_what_is_shown_as_smallest_reachable_is_reachable() -> None:
    for text in ("1.0", "size=2KB", "bops=1K"):
        with pytest.raises(BudgetError, match=f"budget '{text}' cannot be met; with bits 2,3,4,6,8 and the fixed layers") as caught:
            allocate(PROFILE, [text])
        smallest = re.findall(r": ([\d.]+)(MB|G|) to ", str(caught.value))[-1]
        kind, equals, _ = text.partition("=")
        allocate(PROFILE, [(kind + equals if equals else "") + "".join(smallest)])


def test_the_reachable_range_is_given_and_follows_bits_and_fixed_layers() -> None:
    with pytest.raises(
        BudgetError, match=r"average weight bits of '1\.0': 2 to 8; average activation bits of '1\.0': 2 to 8; raise the budget"
    ):
        allocate(PROFILE, ["1.0"])
    with pytest.raises(BudgetError, match="with bits 4,6 .* average weight bits of '3': 4 to 6"):
        allocate(PROFILE, ["3"], bits=[6, 4])
    with pytest.raises(BudgetError, match=r"size of 'size=1KB': 0\.\d+MB to 0\.\d+MB"):
        allocate(PROFILE, ["size=1KB"])
    # embed and head stay at 8 bits, the others reach 2 to 8
    smallest, largest = 1050 * 64 + 4500 * 4, 5550 * 64
    with pytest.raises(BudgetError, match=rf"BitOps of 'bops=1': {smallest / 1e9:.4f}G to {largest / 1e9 + 4.5e-5:.4f}G"):
        allocate(PROFILE, ["bops=1"])


def test_budgets_that_exclude_each_other_are_said_to() -> None:
    """Zero points make few weights in many channels smallest at 8 bits (20 bytes; 21 to 23 below), which an average of 4 forbids."""
    layers = (make_layer("a", "fc1", 4, 1, ["t"], channels=4),)
    profile = make_profile(layers, make_table(layers, BITS, random.Random(0)))
    for budget in ("4.0/8", "size=720B"):
        allocate(profile, [budget])
    with pytest.raises(
        BudgetError, match="each budget can be met alone, but not all together; .* bits of '4.0/8': 2 to 8.*size of 'size=720B': "
    ) as caught:
        allocate(profile, ["4.0/8", "size=720B"])
    assert caught.value.exit_code == 4


def test_layers_of_one_tensor_share_their_activation_bits() -> None:
    for seed in range(8):
        profile = make_profile(LAYERS, make_table(LAYERS, BITS, random.Random(seed)))
        tied, apart = (widths(allocate(profile, ["4.0"], bits_apart=bits_apart)) for bits_apart in (False, True))
        assert tied["b.q"] == tied["b.k"] and tied["b.q"][0] == tied["b.q"][1]
        assert apart["b.q"][1] == apart["b.k"][1]


def test_fixed_layers_keep_their_bits_and_later_ones_win() -> None:
    allocation = allocate(PROFILE, ["3.0"], fixed=["*=6", "b.*=2/4", "b.q*=3/4", "embed=8"])
    assert widths(allocation) == {"embed": (8, 8), "b.q": (3, 4), "b.k": (2, 4), "b.qk": (None, 4), "head": (6, 6)}
    assert allocation.plan.fixed == ("b.k", "b.q", "b.qk", "embed", "head")
    assert allocation.report["average_weight_bits"] is None, "no layer is searched"
    assert allocate(PROFILE, ["3.0"]).plan.fixed == ("embed", "head")


@pytest.mark.parametrize(("budget", "bits_apart"), [("6.0", False), ("size=5.1KB", True)])
def test_a_fixed_layer_imposes_its_activation_bits_on_those_that_read_its_input(budget: str, bits_apart: bool) -> None:
    """Tied, the other reader takes the width for its weight as well and still counts as searched; apart, its weight stays free."""
    found = widths(allocation := allocate(PROFILE, [budget], fixed=["b.k=6"], bits_apart=bits_apart))
    assert found["b.k"] == (6, 6)
    assert found["b.q"][1] == 6
    assert (found["b.q"][0] == 6) is not bits_apart
    assert allocation.report["average_weight_bits"] == found["b.q"][0]
    assert "b.q" not in allocation.plan.fixed
    assert widths(allocate(PROFILE, uniform="4", fixed=["b.k=6"]))["b.q"] == (4, 6)


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        (["b.v=8"], "--fixed 'b.v=8' matches no layer; did you mean"),
        (["zzz.*=8"], "--fixed 'zzz.*=8' matches no layer; `vitq show PROFILE` lists the layers"),
        (["b.q"], "--fixed 'b.q' is not understood; give a pattern of layer names and bits, such as 'blocks.0.*=8'"),
        (["b.q=9"], "--fixed 'b.q=9': '9' is not a width; give whole bits from 2 to 8, such as 4, or 4/8"),
        (["b.q=4/"], "'4/' is not a width"),
        (
            ["b.q=4", "b.k=6"],
            "layers 'b.k' and 'b.q' share their input tensors, so their activation bits must agree, but are fixed at 6 and 4",
        ),
    ],
)
def test_fixed_that_cannot_be_used(fixed: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        allocate(PROFILE, ["4.0"], fixed=fixed)


def test_near_names_are_offered_for_a_mistyped_layer() -> None:
    profile = make_profile(deit(192, 2), make_table(deit(192, 2), BITS, random.Random(0)))
    with pytest.raises(UsageError, match=r"did you mean blocks\.\d\.mlp\.fc1"):
        allocate(profile, ["4.0"], fixed=["*.mlp.fc=8", "*fc1x=8"][:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither a budget nor a uniform width was given; give average bits .* with --budget, or --uniform 4 for no search"),
        ({"budgets": ["4"], "uniform": "4"}, "both budgets and a uniform width were given"),
        ({"uniform": "1"}, "--uniform: '1' is not a width; give whole bits from 2 to 8, such as 4, or 4/8 for weights/activations"),
        ({"uniform": "4.0"}, "--uniform: '4.0' is not a width"),
        (
            {"uniform": "4", "metric": "lrp"},
            "metric 'lrp' is not in the profile, which has random; choose one or run `vitq profile --metric lrp`",
        ),
        (
            {"budgets": ["4"], "bits": [4, 5]},
            "--bits 4,5: metric 'random' has costs at 2,3,4,6,8; choose among these, or run `vitq profile` again",
        ),
        ({"budgets": ["4"], "bits": []}, "--bits names no width: metric 'random' has costs at 2,3,4,6,8"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        allocate(PROFILE, **options)


def restricted(bits: tuple[int, ...]) -> Profile:
    return make_profile(LAYERS, make_table(LAYERS, bits, random.Random(3)))


def test_a_width_above_those_of_the_table_costs_what_the_widest_does() -> None:
    profile = restricted((3, 4))
    table = profile.costs["random"]
    assert allocate(profile, uniform="8").report["objective"] == pytest.approx(sum(costs[1] for costs in table.tied.values()))
    assert widths(allocate(profile, ["4.0"]))["embed"] == (8, 8)


def test_a_width_below_those_of_the_table_has_no_cost() -> None:
    with pytest.raises(UsageError, match=r"layer 'b\.k' at 2 bits has no cost: the profile starts at 3 bits; .* with 2 in --bits"):
        allocate(restricted((3, 4)), uniform="2")


def test_the_first_metric_is_the_default_and_another_can_be_asked_for() -> None:
    tables: dict[str, CostTable] = {name: make_table(LAYERS, BITS, random.Random(name)) for name in ("zeta", "alpha")}
    profile = PROFILE.model_copy(update={"costs": tables})
    default, asked = allocate(profile, ["4.0"]), allocate(profile, ["4.0"], metric="alpha")
    assert default.plan.made_from["allocation"]["metric"] == "zeta"
    assert default.report["objective"] != asked.report["objective"]
    with pytest.raises(InputError, match="the profile holds no costs; run `vitq profile MODEL --images PATH` again"):
        allocate(profile.model_copy(update={"costs": {}}), ["4.0"])


def test_the_plan_is_in_order_of_name_and_keeps_the_report_but_for_seconds() -> None:
    allocation = allocate(PROFILE, ["4.0", "size=9KB"], bits_apart=True)
    plan = allocation.plan
    assert [(entry.name, entry.type) for entry in plan.layers] == sorted((layer.name, layer.type) for layer in LAYERS)
    plan.check(LAYERS)
    assert plan.summary == {key: value for key, value in allocation.report.items() if key != "solve_seconds"}
    assert plan.model == PROFILE.model
    assert plan.made_from == {
        "images": "here",
        "allocation": {
            "metric": "random",
            "objective": "sum",
            "budgets": ["4.0", "size=9KB"],
            "uniform": None,
            "bits": list(BITS),
            "bits_apart": True,
            "fixed": [],
        },
    }


def test_a_profile_of_fixed_layers_only_is_allocated_and_one_of_no_layers_refused() -> None:
    only = (LAYERS[0],)
    report = allocate(make_profile(only, make_table(only, BITS, random.Random(0))), ["2.0"]).report
    assert (report["average_weight_bits"], report["average_weight_bits_all"], report["gap"]) == (None, 8, 0)
    with pytest.raises(InputError, match="the profile has no layers; run `vitq profile MODEL --images PATH` on a model that has some"):
        allocate(make_profile((), make_table((), BITS, random.Random(0))), ["2.0"])
