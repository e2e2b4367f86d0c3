"""The table of latencies: what it predicts, what it refuses, and what a budget in milliseconds makes of it."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from allocation_problems import Problem, deit, make_latencies, make_profile, make_table

from vitq.allocation import allocate, binding_latency
from vitq.artifacts import dump, save
from vitq.errors import BudgetError, InputError
from vitq.latency import LatencyTable, load_latency_table

BITS = (2, 4, 8)
LAYERS = deit(16, 1)
FIXED = {"patch_embed.proj": (8, 8), "head": (8, 8)}
PROFILE = make_profile(LAYERS, make_table(LAYERS, BITS, random.Random(1)))
TABLE = make_latencies(LAYERS, random.Random(2))


@pytest.mark.parametrize("apart", [False, True])
def test_a_predicted_latency_is_the_rest_and_the_sum_of_the_layers(apart: bool) -> None:
    allocation = allocate(PROFILE, ["4.0"], bits_apart=apart, latencies=TABLE)
    plan = {entry.name: (entry.weight_bits, entry.activation_bits) for entry in allocation.plan.layers}
    expected = Problem(PROFILE, BITS, apart, FIXED, latencies=TABLE).latency(plan)
    assert allocation.report["latency_ms"] == float(expected)
    assert allocation.plan.summary["latency_ms"] == float(expected)
    assert "latency_ms" not in allocate(PROFILE, ["4.0"], bits_apart=apart).report
    assert allocate(PROFILE, uniform="4", latencies=TABLE).report["latency_ms"] > 0


def test_a_latency_is_kept_to_the_nanosecond() -> None:
    """The best plan's own latency is enough for it; one nanosecond less is not."""
    free = allocate(PROFILE, ["8"], latencies=TABLE).report
    exactly = allocate(PROFILE, [f"latency={free['latency_ms']:.6f}ms"], latencies=TABLE).report
    assert exactly["objective"] == free["objective"]
    less = allocate(PROFILE, [f"latency={free['latency_ms'] - 1e-6:.6f}ms"], latencies=TABLE).report
    assert less["objective"] >= free["objective"] and less["latency_ms"] < free["latency_ms"]
    for text in (f"latency={1000 * free['latency_ms']:.3f}us", f"latency={free['latency_ms'] / 1000:.9f}s"):
        assert allocate(PROFILE, [text], latencies=TABLE).report["objective"] == free["objective"]


def test_what_is_out_of_reach_says_what_is_not() -> None:
    problem = Problem(PROFILE, BITS, False, FIXED, latencies=TABLE)
    every = [problem.latency(assignment) for assignment in problem.assignments()]
    with pytest.raises(BudgetError, match=r"budget 'latency=0\.001ms' cannot be met; .* latency of 'latency=0\.001ms': ") as caught:
        allocate(PROFILE, ["latency=0.001ms"], latencies=TABLE)
    smallest, largest = re.findall(r"([\d.]+)ms to ([\d.]+)ms", str(caught.value))[0]
    assert float(smallest) == pytest.approx(float(min(every)), abs=1e-4) and float(largest) == pytest.approx(float(max(every)), abs=1e-4)
    found = allocate(PROFILE, [f"latency={smallest}ms"], latencies=TABLE).report
    assert found["latency_ms"] <= float(smallest)


@pytest.mark.parametrize("average", ["3.0", "5.0", "8"])
def test_a_latency_that_binds_lies_between_the_fastest_plan_of_an_average_and_the_best(average: str) -> None:
    problem = Problem(PROFILE, BITS, False, FIXED, latencies=TABLE)
    every = [plan for plan in problem.assignments() if problem.meets(plan, [average])]
    fastest, best = min(map(problem.latency, every)), allocate(PROFILE, [average], latencies=TABLE).report
    found = binding_latency(PROFILE, TABLE, average)
    assert found == pytest.approx((float(fastest) + best["latency_ms"]) / 2, abs=1e-6)
    within = allocate(PROFILE, [average, f"latency={found:.4g}ms"], latencies=TABLE).report
    assert within["latency_ms"] < best["latency_ms"] and within["objective"] >= best["objective"]


def test_no_latency_binds_where_all_plans_take_as_long_or_none_has_the_average() -> None:
    even = TABLE.model_copy(update={"timings": tuple(timing.model_copy(update={"ms": 0.01}) for timing in TABLE.timings)})
    assert binding_latency(PROFILE, even) is None and binding_latency(PROFILE, TABLE, "1.0") is None


def test_a_binding_latency_has_a_price() -> None:
    free = allocate(PROFILE, ["8"], latencies=TABLE).report
    (price,) = allocate(PROFILE, [f"latency={0.9 * free['latency_ms']:.3f}ms"], latencies=TABLE).report["shadow_prices"]
    assert (price["quantity"], price["unit"]) == ("latency", "ms")
    assert price["per_unit"] > 0 and f"{price['step']:g} ms more buys" in price["text"]


def test_without_a_table_a_latency_cannot_be_asked_for() -> None:
    with pytest.raises(InputError, match="budget 'latency=4ms' needs measured latencies.* run `vitq bench --layers` on this machine first"):
        allocate(PROFILE, ["latency=4ms"])


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="those of another model .none.; run `vitq bench --layers` again"):
        allocate(PROFILE, ["4.0"], latencies=TABLE.model_copy(update={"graph_digest": "other"}))
    for layers in (LAYERS[1:], [*LAYERS, LAYERS[0].model_copy(update={"name": "patch_embed.more"})]):
        with pytest.raises(InputError, match=r"the latencies do not fit layer 'patch_embed\.\w+' of the model; run `vitq bench --layers`"):
            allocate(PROFILE, ["4.0"], latencies=make_latencies(layers, random.Random(0)))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    save(TABLE, tmp_path / "latency.json")
    again = load_latency_table(tmp_path / "latency.json")
    assert again == TABLE and dump(again) == dump(TABLE)
    assert again.nanoseconds(LAYERS[1], 4, 8) == TABLE.nanoseconds(LAYERS[1], 4, 8)


def edited(place: str, value: Any) -> dict[str, Any]:
    """The table as JSON with one field, named as `timings.0.ms`, changed."""
    document = inner = json.loads(dump(TABLE))
    *way, last = [int(step) if step.isdecimal() else step for step in place.split(".")]
    for step in way:
        inner = inner[step]
    inner[last] = value
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            edited("timings.0.ms", -1),
            r"timings\.0\.ms: .*greater than or equal to 0 .*write a new one with `vitq bench --layers --run-dir .*`",
        ),
        (edited("timings.0.activation_bits", [3]), "the timings of layer .* do not cover the widths 2 to 8, each once"),
        (edited("timings.0.activation_bits", []), "the timings of layer .* do not cover the widths 2 to 8, each once"),
        (edited("timings.0.weight_bits", None), "the timings of layer .* do not cover the widths 2 to 8, each once"),
        (edited("timings.0.weight_bits", []), r"timings\.0\.weight_bits.*at least 1 item"),
        (edited("timings.0.activation_bits", [9]), r"timings\.0\.activation_bits\.0: "),
        (edited("batch", 0), "batch: "),
        (edited("speed", 1), "speed: Extra inputs are not permitted"),
        (
            edited("format", "vitq-plan/1"),
            "is not a vitq-latency/1 file .found 'vitq-plan/1'.; `vitq bench --layers --run-dir .*` writes one",
        ),
        ([], "is not a vitq-latency/1 file"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        load_latency_table(path)


def test_a_missing_table_says_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latency\.json does not exist; `vitq bench --layers --run-dir .*` writes it"):
        load_latency_table(tmp_path / "latency.json")


def test_equal_shapes_share_a_timing() -> None:
    document = json.loads(dump(TABLE))
    names = [layer.name for layer in LAYERS if layer.has_weight]
    document["timings"] = [{"layers": names, "weight_bits": list(range(2, 9)), "activation_bits": list(range(2, 9)), "ms": 0.5}]
    table = LatencyTable.model_validate(document)
    assert {table.nanoseconds(layer, 3, 5) for layer in LAYERS if layer.has_weight} == {500_000}
