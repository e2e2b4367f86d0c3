"""Layers timed alone: they are the layers of real files, and the table follows from the medians by its equations."""

import json
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from cli_session import make_chain, vitq
from small_models import FAMILIES, captured

import vitq.bench.layers as bench_layers
from vitq.artifacts import Bits, ModelSpec, load_plan, load_profile
from vitq.bench.compare import noise
from vitq.bench.latency import Latency
from vitq.bench.layers import graph_of
from vitq.graph import Graph
from vitq.latency import load_latency_table
from vitq.onnx_file.kernels import INTEGER_KERNELS, optimised_graph
from vitq.onnx_file.timing import LayerFile, made_up, timing_files, whole_file
from vitq.rewrites import fold_layernorms, rewrite
from vitq.runtime import open_session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert all(done.code == 0 for done in make_chain(folder))
    return folder


def spec_of(graph: Graph) -> ModelSpec:
    return ModelSpec(architecture="none", num_classes=10, data_config={}, graph_digest=graph.digest)


def op_types(content: bytes) -> list[str]:
    return sorted(node.op_type for node in optimised_graph(content).node)


@pytest.fixture
def made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph and files of a table are made by the first test that asks for them; what they hold is tested elsewhere."""
    monkeypatch.setattr(bench_layers, "graph_of", lambda spec: graph_once(spec.model_dump_json()))
    monkeypatch.setattr(bench_layers, "timing_files", lambda graph, spec, widths: files_once(spec.model_dump_json(), tuple(widths)))


@cache
def graph_once(spec: str) -> Graph:
    return graph_of(ModelSpec.model_validate_json(spec))


@cache
def files_once(spec: str, widths: tuple[Bits, ...]) -> dict[Bits, tuple[bytes, list[LayerFile]]]:
    return timing_files(graph_once(spec), ModelSpec.model_validate_json(spec), widths)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_one_of_the_files_and_runs_at_any_batch(family: str) -> None:
    graph = fold_layernorms(rewrite(captured(family)[1]))
    found = timing_files(graph, spec_of(graph), (8, 4))
    assert [[file.layers for file in files] for _, files in found.values()] == 2 * [[file.layers for file in found[8][1]]]
    for bits in (8, 4):
        every_layer_is_one_of_the_files(graph, *found[bits])


def every_layer_is_one_of_the_files(graph: Graph, whole: bytes, files: list[LayerFile]) -> None:
    layers = {layer.name: layer for layer in graph.layers}
    assert sorted(name for file in files for name in file.layers) == sorted(layers)
    fused = {node.name for node in optimised_graph(whole).node if node.op_type in INTEGER_KERNELS}
    for file in files:
        first = layers[file.layers[0]]
        for name in file.layers:  # of one kind
            assert [operand.shape for operand in layers[name].operands] == [operand.shape for operand in first.operands]
            assert layers[name].macs == first.macs
        runtime = open_session(file.content, 1)
        kernels = [
            node for node in optimised_graph(file.content).node if node.op_type in INTEGER_KERNELS and node.name
        ]  # a softmax's sums have none
        assert len(kernels) == (1 if any(name == first.name or name.startswith(first.name + ".") for name in fused) else 0)
        given = graph.layer_node(first.name).meta["val"].shape
        for batch in (1, 3):
            arrays = [noise((batch * shape[0], *shape[1:])) for shape in file.shapes]
            (output,) = runtime.run(None, {put.name: array for put, array in zip(runtime.get_inputs(), arrays, strict=True)})
            assert output.shape == (batch * given[0], *given[1:])
            assert torch.from_numpy(output).isfinite().all()


@pytest.mark.parametrize(("uniform", "bits"), [("8", 8), ("3/8", 8), ("6/4", 4)])
def test_the_timed_model_has_the_ops_of_a_real_file_whatever_the_weights_widths(session: Path, uniform: str, bits: int) -> None:
    """Patch embedding and head follow the plan here, so that all layers have one activation width."""
    folder = session / f"run-{uniform.replace('/', '-')}"
    for command in (
        ("allocate", session / "vitq-run" / "profile.json", "--uniform", uniform, "--fixed", f"*={uniform}", "-o", folder / "plan.json"),
        ("calibrate", folder / "plan.json"),
        ("export", folder / "model.safetensors"),
    ):
        done = vitq(*command, folder=session)
        assert done.code == 0, done.err
    spec = load_plan(folder / "plan.json").model
    whole = whole_file(made_up(graph_once(spec.model_dump_json()), spec, bits))  # type: ignore[arg-type]
    real = (folder / "model.onnx").read_bytes()
    # Below 8 bits a real softmax may do without its Clip.
    softmaxes = sum(node.op_type == "Softmax" for node in onnx.load_model_from_string(real).graph.node)
    timed, found = op_types(whole), op_types(real)
    assert [op for op in timed if op != "Clip"] == [op for op in found if op != "Clip"]
    assert 0 <= timed.count("Clip") - found.count("Clip") <= softmaxes


def test_the_table_follows_from_the_medians(session: Path, monkeypatch: pytest.MonkeyPatch, made_once: None) -> None:
    """With made-up medians: a run without ops 1 ms; at 8 bits the model 100 ms and layers 1.5, 2.0, ...; below 107 ms and 2.5, 3.0, ..."""
    profile = load_profile(session / "vitq-run" / "profile.json")
    kinds = len(files_once(profile.model.model_dump_json(), tuple(bench_layers.FORMS))[8][1])
    assert kinds == 8  # patch embedding, qkv, qk, av, proj, fc1, fc2, head: two blocks share theirs
    medians = [1.0, 100.0, 107.0, 103.0, *(1.5 + 0.5 * at for at in range(kinds)), *(2.5 + 0.5 * at for at in range(kinds))]
    timed = []

    def fake(calls: list, rounds: int | None, progress: Any = None) -> list[Latency]:
        timed.append(len(calls))
        for run in calls:
            run()
        return [Latency(median, median) for median in medians]

    monkeypatch.setattr(bench_layers, "interleaved", fake)
    table = bench_layers.latency_table(profile.model, 2, 1, 5)
    assert timed == [len(medians)]  # all in one interleaved measurement
    table.check(profile.layers, profile.model.graph_digest)
    assert (table.batch, table.threads) == (2, 1)
    order = [
        "patch_embed.proj",
        *(f"blocks.0.{name}" for name in ("attn.qkv", "attn.qk", "attn.av", "attn.proj", "mlp.fc1", "mlp.fc2")),
        "head",
    ]
    wide = dict(zip(order, (0.5 + 0.5 * at for at in range(kinds)), strict=True))
    assert [timing.layers[0] for timing in table.timings] == order * 2
    for layer in profile.layers:
        ms = wide[layer.name.replace("blocks.1", "blocks.0")]
        for weight in range(2, 9) if layer.has_weight else [None]:
            assert table.nanoseconds(layer, weight, 8) == ms * 10**6
            below = (ms + 7 / len(profile.layers)) * 10**6  # alone each takes 1 ms more, together they take 7 ms more
            assert [table.nanoseconds(layer, weight, bits) for bits in range(2, 8)] == pytest.approx([below] * 6, abs=1)
    layers = sum(wide[layer.name.replace("blocks.1", "blocks.0")] for layer in profile.layers)
    assert table.rest_ms == pytest.approx(100 - layers)
    narrow = [
        layer
        for _, block in [(name, list(block)) for name, block in groupby(profile.layers, lambda layer: layer.block)][1::2]
        for layer in block
    ]
    predicted = pytest.approx(100 + 7 * len(narrow) / len(profile.layers), abs=1e-5)
    assert table.made_from["whole_ms"] == {"8": 100, "below": 107, "mixed": {"measured": 103, "predicted": predicted}}


@pytest.mark.parametrize(
    ("extra", "alone", "counts", "expected"),
    [(6.0, [1.0, 2.0], [2, 2], [1.0, 2.0]), (3.0, [1.0, -5.0], [3, 1], [1.0, 0.0]), (5.0, [0.0, -1.0], [1, 1], [0.0, 0.0])],
)
def test_what_narrow_activations_cost_is_shared_out(extra: float, alone: list[float], counts: list[int], expected: list[float]) -> None:
    found = bench_layers.shared_out(extra, np.array(alone), np.array(counts))
    assert found.tolist() == expected


def test_a_layer_faster_than_nothing_takes_no_time(session: Path, monkeypatch: pytest.MonkeyPatch, made_once: None) -> None:
    profile = load_profile(session / "vitq-run" / "profile.json")
    medians = [Latency(1.0, 1.0), Latency(0.9, 1.0)]
    monkeypatch.setattr(bench_layers, "interleaved", lambda calls, rounds, progress: medians[:1] + medians[1:] * (len(calls) - 1))
    table = bench_layers.latency_table(profile.model, 1, 1, 1)
    assert {timing.ms for timing in table.timings} == {0} and table.rest_ms == 0.9


def test_from_layers_to_a_plan_on_the_command_line(session: Path, made_once: None) -> None:
    missing = vitq("allocate", "--budget", "latency=1ms", "--run-dir", "vitq-run", "-o", "plan.json", folder=session)
    assert missing.code == 3 and "latency.json does not exist; `vitq bench --layers` writes it" in missing.err
    done = vitq("bench", "--layers", "--rounds", 2, "--threads", 1, "--json", folder=session)
    assert done.code == 0, done.err
    table = load_latency_table(session / "vitq-run" / "latency.json")
    assert done.document == json.loads((session / "vitq-run" / "latency.json").read_text())
    again = vitq("bench", "--layers", "vitq-run/model.onnx", "--rounds", 1, "-o", "other.json", folder=session)
    assert again.code == 0
    proposed = again.err.rpartition("next: ")[2]
    assert proposed.startswith("vitq allocate --budget 4.0") and ("latency=" in proposed) == ("--latency-table other.json" in proposed)
    assert max(map(len, again.out.splitlines())) <= 80
    found = vitq("allocate", "--budget", "latency=1s", "--budget", "4.0", "--force", "--json", folder=session)
    assert found.code == 0, found.err
    plan = load_plan(session / "vitq-run" / "plan.json").bits
    layers = load_profile(session / "vitq-run" / "profile.json").layers
    expected = table.rest_nanoseconds + sum(
        table.nanoseconds(layer, plan[layer.name].weight_bits, plan[layer.name].activation_bits) for layer in layers
    )
    assert found.document["latency_ms"] == expected / 10**6
    assert found.document["shadow_prices"][0]["quantity"] == "latency"
    other = vitq("allocate", "--budget", "latency=1s", "--latency-table", "other.json", "--force", folder=session)
    assert other.code == 0 and "latency       " in other.out
    refused = vitq("allocate", "--budget", "latency=1us", "--force", folder=session)
    assert refused.code == 4 and "budget 'latency=1us' cannot be met" in refused.err and "latency of 'latency=1us': " in refused.err


@pytest.mark.parametrize("option", [("--baselines",), ("--max-ms", 1), ("--batch", 1, "--batch", 2), ("a.onnx", "b.onnx")])
def test_layers_leave_no_room_for_files(session: Path, option: tuple[object, ...]) -> None:
    done = vitq("bench", "--layers", *option, folder=session)
    assert done.code == 2 and "--layers measures one model at one --batch, no files" in done.err
    gone = vitq("bench", "--layers", "--run-dir", "gone", folder=session)
    assert gone.code == 3 and "profile.json does not exist; `vitq profile MODEL --images PATH --run-dir gone` writes it" in gone.err


def test_a_profile_of_another_graph_is_refused(session: Path) -> None:
    spec = load_profile(session / "vitq-run" / "profile.json").model
    with pytest.raises(bench_layers.InputError, match="the profile was made for another graph of vit_tiny_patch16_224; run `vitq profile`"):
        bench_layers.graph_of(spec.model_copy(update={"graph_digest": "other"}))
