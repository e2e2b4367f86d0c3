"""Latency of ONNX files: the float32 file computes the model, runs are interleaved, and a process of its own sees a file's memory alone."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from cli_session import make_model

import vitq.bench.latency as latency
from vitq.accuracy import onnx_runnable
from vitq.bench import compare, export_float, footprint, latencies, write_baselines
from vitq.bench.latency import input_shape, interleaved
from vitq.errors import InputError
from vitq.models import load
from vitq.rewrites import prepare
from vitq.runtime import open_session


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def float_file(model: Path) -> Path:
    path = model.parent / "float.onnx"
    export_float(prepare(load(str(model)))[0], path)
    return path


def write_product(path: Path, rows: int, batch: int | str = "batch", inputs: int = 1) -> Path:
    """A file whose only op multiplies (batch, rows) by a matrix of rows x 1024 ones."""
    matrix = onnx.numpy_helper.from_array(np.ones((rows, 1024), np.float32), "w")
    given = [onnx.helper.make_tensor_value_info(f"x{i}", onnx.TensorProto.FLOAT, [batch, rows]) for i in range(inputs)]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, 1024])
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x0", "w"], ["y"])], "product", given, [output], [matrix])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def test_the_float_file_computes_the_model(model: Path, float_file: Path):
    loaded = load(str(model))
    assert not list(float_file.parent.glob("*.data"))  # the weights are in it
    assert not onnx.load(float_file).graph.value_info
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            torch.testing.assert_close(onnx_runnable(float_file)(images), loaded.module(images), rtol=1e-4, atol=1e-4)


def test_more_images_take_longer(float_file: Path):
    (one,) = latencies([float_file], torch.zeros(1, 3, 32, 32), rounds=15, warmup=3)
    first, second = latencies([float_file] * 2, torch.zeros(64, 3, 32, 32), rounds=15, warmup=3)
    assert 4 * one.median_ms < min(first.median_ms, second.median_ms)
    assert 0 < first.median_ms <= first.p90_ms


def test_calls_take_turns_and_warming_up_is_not_counted(monkeypatch: pytest.MonkeyPatch):
    """On a clock of our own: the first call takes 100 s twice, then 1, 2, ... 10 ms; the second always 5 ms."""
    now, order = 0.0, []
    lasts = {"a": itertools.chain([100.0, 100.0], (n / 1000 for n in (3, 1, 2, 10, 9, 8, 7, 6, 5, 4))), "b": itertools.repeat(0.005)}

    def take(name: str) -> None:
        nonlocal now
        order.append(name)
        now += next(lasts[name])

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    first, second = interleaved([lambda: take("a"), lambda: take("b")], rounds=10, warmup=2)
    assert order == ["a", "b"] * 12
    assert first.median_ms == pytest.approx(5.5)
    assert first.p90_ms == pytest.approx(9.1)  # nine of ten intervals between 1 and 10
    assert (second.median_ms, second.p90_ms) == (pytest.approx(5), pytest.approx(5))


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 200), (0.1, 100), (3.0, 20)])
def test_the_number_of_rounds_follows_the_time_of_a_call(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int):
    now, count = 0.0, 0

    def take() -> None:
        nonlocal now, count
        now, count = now + seconds, count + 1

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    interleaved([take, take], warmup=1)
    assert count == 2 * (rounds + 1)


def test_rows_follow_from_the_medians(tmp_path: Path, float_file: Path):
    other = write_product(tmp_path / "other.onnx", 64)
    rows = compare({"one": float_file, "other": other}, [2, 5], threads=1, rounds=3)
    assert [(row.name, row.batch, row.threads) for row in rows] == [("one", 2, 1), ("other", 2, 1), ("one", 5, 1), ("other", 5, 1)]
    for first, second in (rows[:2], rows[2:]):
        assert (first.speedup, second.speedup) == (1, pytest.approx(first.median_ms / second.median_ms))
        assert second.images_per_second == pytest.approx(second.batch / (second.median_ms / 1000))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.onnx does not exist; `vitq export -o \S*gone\.onnx` writes it"):
        latencies([tmp_path / "gone.onnx"], torch.zeros(1, 3, 32, 32))


def test_a_file_of_another_batch_or_other_inputs_is_refused(tmp_path: Path):
    fixed = open_session(write_product(tmp_path / "fixed.onnx", 8, batch=4), 1)
    assert input_shape(fixed, "fixed.onnx", 4) == (4, 8)
    with pytest.raises(InputError, match=r"fixed\.onnx takes batches of 4 only; give --batch 4"):
        input_shape(fixed, "fixed.onnx", 1)
    two = open_session(write_product(tmp_path / "two.onnx", 8, inputs=2), 1)
    with pytest.raises(InputError, match=r"two\.onnx takes .* runs files with one float32 input"):
        input_shape(two, "two.onnx", 1)


def test_memory_is_that_of_the_file_and_not_of_this_process(tmp_path: Path):
    """A file with 64 MiB more of weights needs at least that much more; 600 MB that this process holds are not counted."""
    held = np.ones(600_000_000, np.uint8)
    small, large = (footprint(write_product(tmp_path / f"{rows}.onnx", rows), (1, rows), 1) for rows in (16, 16 * 1024 + 16))
    assert held.sum() == 600_000_000
    if small.peak_memory_bytes is not None and large.peak_memory_bytes is not None:
        assert 10_000_000 < small.peak_memory_bytes < 300_000_000
        assert 64 * 2**20 < large.peak_memory_bytes - small.peak_memory_bytes < 6 * 64 * 2**20
    assert small.load_ms > 0


def test_a_process_that_fails_is_reported(tmp_path: Path):
    with pytest.raises(InputError, match=r"x\.onnx cannot be run in a process of its own: .*; give a smaller --batch"):
        footprint(write_product(tmp_path / "x.onnx", 16), (1, 17), 1)


def test_baselines_are_quantized_and_near_the_model(model: Path, tmp_path: Path):
    loaded = load(str(model))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    files = write_baselines(loaded, images, tmp_path)
    assert list(files) == ["float32", "quantize_dynamic", "quantize_static"]
    ops = {name: {node.op_type for node in onnx.load(file).graph.node} for name, file in files.items()}
    assert not ops["float32"] & {"MatMulInteger", "QuantizeLinear", "DynamicQuantizeLinear"}
    assert {"DynamicQuantizeLinear", "MatMulInteger"} <= ops["quantize_dynamic"]
    assert {"QuantizeLinear", "DequantizeLinear"} <= ops["quantize_static"]
    with torch.no_grad():
        expected = loaded.module(images)
    for name, near in (("float32", 0.999999), ("quantize_dynamic", 0.97), ("quantize_static", 0.97)):
        found = onnx_runnable(files[name])(images)
        assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > near
