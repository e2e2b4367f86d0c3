"""Measures against plain numpy, from logits that are given."""

import math
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitq.accuracy import Estimate, Evaluation, evaluate, onnx_runnable
from vitq.cli.evaluate import _lines
from vitq.errors import InputError
from vitq.runtime import onnx_metadata

FLOAT = onnx.TensorProto.FLOAT


def lookup(table: Tensor):
    """A model whose images hold the row of `table` to answer with."""
    return lambda images: table[images[:, 0, 0, 0].long()]


def batches_of(labels: Tensor | None, count: int, size: int) -> list[tuple[Tensor, Tensor | None]]:
    numbers = torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    parts = zip(numbers.split(size), labels.split(size) if labels is not None else [None] * count, strict=False)
    return [(images, label) for images, label in parts]


def mean_and_margin(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(1.96 * values.std() / math.sqrt(len(values)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def assert_estimate(found: Estimate | None, values: np.ndarray) -> None:
    assert found is not None
    assert (found.mean, found.margin) == pytest.approx(mean_and_margin(values), rel=1e-6, abs=1e-9)


@given(st.integers(1, 40), st.integers(2, 9), st.integers(1, 7), st.floats(0, 3), st.integers(0, 1000))
def test_measures_are_those_of_numpy(count: int, classes: int, size: int, noise: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    reference = 3 * torch.randn(count, classes, generator=generator)
    logits = reference + noise * torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    found = evaluate(lookup(logits), batches_of(labels, count, size), lookup(reference))

    z, r, y = logits.double().numpy(), reference.double().numpy(), labels.numpy()
    rank = (z > z[np.arange(count), y][:, None]).sum(1)
    assert found.num_images == count
    assert_estimate(found.top1, 100.0 * (rank == 0))
    assert_estimate(found.top5, 100.0 * (rank < 5))
    assert_estimate(found.agreement, 100.0 * (z.argmax(1) == r.argmax(1)))
    p = np.exp(log_softmax(r))
    assert_estimate(found.kl, (p * (log_softmax(r) - log_softmax(z))).sum(1))
    assert_estimate(found.top1_change, 100.0 * (z.argmax(1) == y) - 100.0 * (r.argmax(1) == y))
    assert found.cosine is None and found.relative_error is None


def test_the_float_model_against_itself():
    logits = torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
    found = evaluate(lookup(logits), batches_of(None, 30, 8), lookup(logits))
    assert found.agreement == Estimate(100.0, 0.0) and found.kl == Estimate(0.0, 0.0)
    assert found.top1 is None and found.top5 is None and found.top1_change is None


def test_small_differences_are_seen():
    reference = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    logits = reference + 1e-3 * torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
    found = evaluate(lookup(logits), batches_of(None, 200, 64), lookup(reference))
    p, q = (log_softmax(x.double().numpy()) for x in (reference, logits))
    assert found.kl is not None and 0 < found.kl.mean < 1e-6
    assert found.kl.mean == pytest.approx(float((np.exp(p) * (p - q)).sum(1).mean()), rel=1e-4)


def test_people_are_told_an_interval_of_a_share_that_is_all_or_nothing():
    """Wilson's at the ends, written out: n of n is at least n / (n + z^2)."""
    lines = _lines(Evaluation(40, top1=Estimate(0.0, 0.0), agreement=Estimate(100.0, 0.0), kl=Estimate(0.25, 0.125)))
    end = 100 * 40 / (40 + 1.959964**2)
    assert lines[0].split() == ["top1", "0", "%", "(0.0", "to", f"{100 - end:.1f})"]
    assert lines[1].split() == ["agreement", "100", "%", f"({end:.1f}", "to", "100.0)"]
    assert lines[2].split() == ["kl", "0.25", "±", "0.12", "nats", "an", "image"]


def test_paired_margins_are_narrower_than_those_of_two_runs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (400,), generator=generator)
    reference = torch.randn(400, 10, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 10)
    logits = reference + 0.1 * torch.randn(400, 10, generator=generator)
    found = evaluate(lookup(logits), batches_of(labels, 400, 100), lookup(reference))
    assert found.top1 is not None and found.top1_change is not None
    assert found.top1_change.margin < 0.5 * found.top1.margin
    alone = evaluate(lookup(reference), batches_of(labels, 400, 100))
    assert alone.top1 is not None and alone.kl is None and alone.agreement is None
    assert found.top1.mean - alone.top1.mean == pytest.approx(found.top1_change.mean)


def test_the_margin_holds_the_truth_in_most_samples():
    truth, held = 70.0, 0
    for seed in range(200):
        right = torch.rand(300, generator=torch.Generator().manual_seed(seed)) < truth / 100
        logits = torch.stack([right.float(), 1 - right.float()], 1)
        found = evaluate(lookup(logits), batches_of(torch.zeros(300, dtype=torch.long), 300, 300)).top1
        assert found is not None
        held += abs(found.mean - truth) <= found.margin
    assert 180 <= held <= 198  # 95 %


def test_backbones_are_compared_by_their_features():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(9, 4, 6, generator=generator)
    features = reference + 0.3 * torch.randn(9, 4, 6, generator=generator)
    found = evaluate(lookup(features), batches_of(torch.zeros(9, dtype=torch.long), 9, 4), lookup(reference), classifier=False)
    a, b = (x.double().numpy().reshape(9, -1) for x in (features, reference))
    assert_estimate(found.cosine, (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    assert_estimate(found.relative_error, np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1))
    assert found == Evaluation(9, cosine=found.cosine, relative_error=found.relative_error)
    assert evaluate(lookup(features), batches_of(None, 9, 4), classifier=False) == Evaluation(9)


def test_fewer_than_five_classes_have_a_top5_of_all():
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    found = evaluate(lookup(logits), batches_of(torch.zeros(20, dtype=torch.long), 20, 6))
    assert found.top5 == Estimate(100.0, 0.0)


def test_no_images_are_an_error():
    with pytest.raises(InputError, match="there were no images to evaluate on; give --images"):
        evaluate(lookup(torch.zeros(1, 2)), [])


def test_a_reference_of_other_classes_is_an_error():
    with pytest.raises(InputError, match=r"the outputs differ in shape: \(2, 3\), the float model's \(2, 5\); give the float model"):
        evaluate(lookup(torch.zeros(2, 3)), batches_of(None, 2, 2), lookup(torch.zeros(2, 5)))


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """Twice the mean of each channel."""
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0), node("Add", ["mean", "mean"], ["logits"])],
        "double",
        [tensor("image", FLOAT, ["batch", 3, 4, 4])],
        [tensor("logits", FLOAT, ["batch", 3])],
        [onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [2, 3])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.helper.set_model_props(model, {"vitq.num_classes": "3", "vitq.labels": '["a", "b"]', "author": "nobody"})
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("threads", [0, 1])
def test_an_onnx_file_runs_at_any_batch(onnx_file: Path, threads: int):
    runnable = onnx_runnable(onnx_file, threads)
    for count in (1, 4):
        x = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(count))
        assert torch.allclose(runnable(x), 2 * x.mean((2, 3)), atol=1e-6)


def test_metadata_is_parsed_where_it_is_json(onnx_file: Path):
    assert onnx_metadata(onnx_file) == {"vitq.num_classes": 3, "vitq.labels": ["a", "b"], "author": "nobody"}


def test_onnx_files_that_cannot_be_read(onnx_file: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"nothing.onnx does not exist; `vitq export -o \S+` writes it"):
        onnx_runnable(tmp_path / "nothing.onnx")
    onnx_file.write_bytes(onnx_file.read_bytes()[:50])
    with pytest.raises(
        InputError, match=r"model.onnx cannot be loaded by onnxruntime: .*; `vitq export --force --run-dir \S+` writes a new one"
    ):
        onnx_metadata(onnx_file)
