"""Moves against budgets by definition, random plans and the update against brute force, layer errors against layers run again."""

import itertools
import random

import pytest
import torch
from allocation_problems import make_layer, make_profile, make_table
from small_models import captured, images

from vitq.affine import quantize_weight
from vitq.allocation import Wishes, allocate, lay_out
from vitq.allocation.budgets import Budget, Whole, parse_budget
from vitq.allocation.choices import settle
from vitq.allocation.moves import Bits, Moves
from vitq.artifacts import BitPlan, LayerBits, ModelSpec
from vitq.calibration.fast import fit_fast
from vitq.fitting import fit_operand
from vitq.graph import values_at
from vitq.ranges import fold, weight_ranges
from vitq.rewrites import rewrite
from vitq.trials import Judge, Trials, audit, refine
from vitq.trials.audit import random_plan
from vitq.trials.refine import layer_errors

LAYERS = (
    make_layer("q", "q", 40, 400, ["x"], 4),
    make_layer("k", "k", 60, 300, ["x"], 4),
    make_layer("qk", "qk", 0, 200, ["a", "b"]),
    make_layer("fc", "fc1", 100, 900, ["y"], 4),
    make_layer("head", "head", 10, 10, ["z"], 4),
)
WIDTHS = (2, 3, 4)


def moves_of(budgets: list[str], bits_apart: bool = False) -> Moves:
    scope = settle(LAYERS, ())
    return Moves.of(scope, [budget for text in budgets for budget in parse_budget(text, scope, Whole(0))], WIDTHS, bits_apart)


def uniform(width: int) -> Bits:
    return {layer.name: (width if layer.has_weight else None, width) for layer in LAYERS} | {"head": (8, 8)}


def every_plan() -> list[Bits]:
    """Every plan of the tied layers, written out: q and k share a tensor and so a width."""
    plans = []
    for shared, qk, fc in itertools.product(WIDTHS, repeat=3):
        plans.append({"q": (shared, shared), "k": (shared, shared), "qk": (None, qk), "fc": (fc, fc), "head": (8, 8)})
    return plans


def average_at_most(bits: Bits, limit: float) -> bool:
    """Weights over parameters and activations over MACs, by definition, the head left out."""
    weights = sum(layer.parameters * (bits[layer.name][0] or 0) for layer in LAYERS[:-1])
    activations = sum(layer.macs * bits[layer.name][1] for layer in LAYERS[:-1])
    return weights <= limit * 200 and activations <= limit * 1800


def test_units_move_together_and_fixed_layers_do_not():
    moves = moves_of([])
    assert [(unit.weights, unit.activations) for unit in moves.units] == [(("fc",), ("fc",)), (("k", "q"), ("k", "q")), ((), ("qk",))]
    up = moves.moved(uniform(3), moves.units[1], 1)
    assert up == uniform(3) | {"q": (4, 4), "k": (4, 4)}
    assert moves.moved(uniform(4), moves.units[0], 1) is None and moves.moved(uniform(2), moves.units[0], -1) is None
    apart = moves_of([], bits_apart=True)
    assert sorted((unit.weights, unit.activations) for unit in apart.units) == sorted(
        [((), ("fc",)), (("fc",), ()), ((), ("k", "q")), (("k",), ()), (("q",), ()), ((), ("qk",))]
    )
    name = next(unit for unit in apart.units if unit.weights == ("q",))
    assert apart.moved(uniform(3), name, -1) == uniform(3) | {"q": (2, 3)}


@pytest.mark.parametrize("limit", [2.0, 2.7, 3.3, 4.0])
def test_budgets_hold_by_definition(limit: float):
    moves = moves_of([str(limit)])
    assert all(moves.meets(bits) == average_at_most(bits, limit) for bits in every_plan())


def test_a_random_plan_keeps_to_a_latency_that_narrower_widths_break():
    """Here the widest plan is the fastest: from a plan that may have one narrow layer, no random plan has two."""
    scope = settle(LAYERS, ())
    slow = Budget("latency=0ms", "latency", lambda layer, weight_bits, activation_bits: int(activation_bits < 4), limit=2)
    moves = Moves.of(scope, [slow], WIDTHS, False)
    found = [random_plan(moves, uniform(4), random.Random(seed)) for seed in range(8)]
    assert all(moves.meets(bits) for bits in found)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_plan_spends_the_budget(seed: int):
    moves = moves_of(["3.1"])
    found = random_plan(moves, uniform(3), random.Random(seed))
    assert found == random_plan(moves, uniform(2), random.Random(seed)) and found["head"] == (8, 8)
    assert average_at_most(found, 3.1)
    wider = [moves.moved(found, unit, 1) for unit in moves.units]
    assert not any(bits is not None and average_at_most(bits, 3.1) for bits in wider)


def test_random_plans_differ():
    moves = moves_of(["3.1"])
    assert len({str(random_plan(moves, uniform(3), random.Random(seed))) for seed in range(20)}) > 2


def test_an_audit_compares_the_order_of_plans_of_one_budget():
    moves = moves_of(["3.1"])

    def predict(bits: Bits) -> float:
        return sum(width * len(name) ** 0.5 for name, (_, width) in bits.items()) + bits["k"][1] / 10

    same = audit(uniform(3), uniform(3), moves, 6, predict, lambda bits: [predict(bits), 3 * predict(bits)], seed=1)
    assert same.names[0] == "chosen" and same.names[-1] == "uniform" and len(same.names) == 8
    assert same.compared == 7, "the uniform plan is of another budget"
    assert same.correlation == pytest.approx(1.0) and same.ratio == pytest.approx(2.0)
    assert audit(uniform(3), None, moves, 6, predict, lambda bits: [-predict(bits)], seed=1).correlation == pytest.approx(-1.0)
    assert audit(uniform(3), None, moves, 1, predict, lambda bits: [predict(bits)], seed=1).correlation is None
    assert audit(uniform(3), None, moves, 6, predict, lambda bits: [1.0], seed=1).correlation is None


def test_an_audit_says_how_well_its_images_agree():
    """Halves that put the plans into one order, into opposite ones, and a single image, which has no halves."""
    moves = moves_of(["3.1"])

    def predict(bits: Bits) -> float:
        return sum(width * len(name) ** 0.5 for name, (_, width) in bits.items()) + bits["k"][1] / 10

    def repeated(*factors: float) -> float | None:
        return audit(uniform(3), None, moves, 6, predict, lambda bits: [factor * predict(bits) for factor in factors]).repeatability

    assert repeated(1, 2, 3) == pytest.approx(1.0)
    assert repeated(5, -1, -1, -1) == pytest.approx(-1.0), "images 0 and 2 are one half"
    assert repeated(1) is None


def test_trials_measure_each_image():
    """Against the two networks run on all images at once."""
    fitting, held_out = [(images(4, 32), None)], images(5, 32)
    folded, histograms = fold(rewrite(captured("vit")[1]), fitting)
    entries = [
        LayerBits(name=layer.name, type=layer.type, weight_bits=3 if layer.has_weight else None, activation_bits=3)
        for layer in folded.layers
    ]
    spec = ModelSpec(architecture="vit", num_classes=10, data_config={"input_size": [3, 32, 32]}, graph_digest=folded.digest)
    plan = BitPlan(model=spec, layers=tuple(entries))
    trials = Trials(folded, histograms, {}, fitting, [(held_out[:3], None), (held_out[3:], None)], 10)
    again = fit_fast(folded, histograms, plan, fitting).quantized_module()
    with torch.no_grad():
        log_p, log_q = (module(held_out).double().log_softmax(-1) for module in (folded.module, again))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    for _ in range(2):
        assert trials.losses(plan) == pytest.approx(expected.tolist(), rel=1e-4)


ERRORS = {
    "q": {2: 0.3, 3: 0.1, 4: 0.02},
    "k": {2: 0.2, 3: 0.05, 4: 0.01},
    "qk": {2: 0.5, 3: 0.2, 4: 0.05},
    "fc": {2: 0.05, 3: 0.01, 4: 0.002},
    "head": {2: 0.0, 3: 0.0, 4: 0.0},
}


def test_the_update_takes_the_largest_gain_and_the_smallest_loss():
    """At 3 bits qk gains most (0.15, as q and k together gain 0.12), and fc loses least (0.04)."""
    found = refine(uniform(3), moves_of(["3.2"]), ERRORS, lambda bits: 1.0, patience=1)
    assert [(step.up, step.down, step.kept) for step in found.steps] == [("qk", "fc", False)]
    assert found.bits == uniform(3) and found.loss == found.start == 1.0


@pytest.mark.parametrize("seed", range(10))
def test_the_update_never_ends_worse_nor_over_budget(seed: int):
    moves, chance = moves_of(["3.2"]), random.Random(seed)
    losses = {str(sorted(bits.items())): chance.random() for bits in every_plan()}
    found = refine(uniform(3), moves, ERRORS, lambda bits: losses[str(sorted(bits.items()))], patience=3)
    assert average_at_most(found.bits, 3.2)
    assert found.loss == losses[str(sorted(found.bits.items()))] <= found.start == losses[str(sorted(uniform(3).items()))]
    kept = [step.loss for step in found.steps if step.kept]
    assert kept == sorted(kept, reverse=True) and found.loss == min([found.start, *kept])


def test_the_update_finds_the_best_plan_that_pairs_lead_to():
    moves = moves_of(["3.2"])
    loss = {str(sorted(bits.items())): sum(ERRORS[name][bits[name][1]] for name in ("q", "k", "qk", "fc")) for bits in every_plan()}
    found = refine(uniform(3), moves, ERRORS, lambda bits: loss[str(sorted(bits.items()))], patience=20)
    raised = uniform(3) | {"qk": (None, 4), "fc": (2, 2)}
    assert found.bits == raised


@pytest.mark.parametrize("better", ["another plan", "none"])
def test_the_report_of_a_refined_plan_is_its_own(better: str):
    profile = make_profile(LAYERS, make_table(LAYERS, WIDTHS, random.Random(0)), 100)
    chosen = allocate(profile, ["3.2"])
    start = {entry.name: entry.activation_bits for entry in chosen.plan.layers}

    def measure(plan: BitPlan) -> list[float]:
        moved = sum(abs(entry.activation_bits - start[entry.name]) for entry in plan.layers)
        return [-moved] if better == "another plan" else [moved]

    refined, found = Judge(lay_out(profile, Wishes(), ["3.2"]), ["3.2"], measure).refined(chosen, ERRORS)
    report = refined.report
    assert {key: value for key, value in report.items() if key not in ("refinement", "solve_seconds")} == refined.plan.summary
    if better == "none":
        assert refined.plan == chosen.plan and report == chosen.report | {"refinement": report["refinement"]}
        return
    table = profile.costs["random"]
    bits = {name: min(width, 4) for name, (_, width) in found.bits.items()}  # the head's 8 bits cost what the widest width does
    assert report["objective"] == pytest.approx(sum(table.tied[name][WIDTHS.index(width)] for name, width in bits.items()))
    assert chosen.report["shadow_prices"] and report["shadow_prices"] == [], "prices are those of the best predicted plan"
    assert report["bound"] == chosen.report["bound"] <= report["objective"]
    assert report["gap"] == (report["objective"] - report["bound"]) / report["objective"]
    assert report["status"] == "refined by measuring"


def test_layer_errors_are_those_of_layers_run_again():
    graph = rewrite(captured("vit")[1])
    x = images(4, 32)
    folded, histograms = fold(graph, [(x, None)])
    found = layer_errors(folded, histograms, {}, [(x[:2], None), (x[2:], None)], (2, 4))
    assert set(found) == {layer.name for layer in folded.layers}
    for layer in folded.layers:
        node = folded.layer_node(layer.name)
        values = values_at(folded.module, x, [node.name, *(argument.name for argument in node.args[:2] if argument.op == "call_function")])
        for bits in (2, 4):
            read = []
            for operand, argument in zip(layer.operands, node.args[:2], strict=True):
                if operand.role == "weight":
                    weight = folded.module.get_parameter(str(argument.target))
                    read.append(quantize_weight(weight, *weight_ranges(weight, bits), bits).dequantize())
                else:
                    value = values[argument.name] if argument.op == "call_function" else x
                    read.append(fit_operand(histograms[operand.tensor], bits, operand.role).quantize_dequantize(value))
            output = values[node.name]
            again = (
                read[0] @ read[1]
                if layer.op == "matmul"
                else torch.nn.functional.linear(read[0], read[1], folded.module.get_parameter(str(node.args[2].target)))
            )
            expected = float((again - output).square().sum() / output.square().sum())
            assert found[layer.name][bits] == pytest.approx(expected, rel=1e-3), (layer.name, bits)
