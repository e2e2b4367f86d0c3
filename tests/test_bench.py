"""Latency of ONNX files: the float32 file computes the model, and a file with more to compute takes longer."""

from pathlib import Path

import pytest
import torch
from cli_session import make_model

from vitq.bench import export_float, latencies
from vitq.errors import InputError
from vitq.evaluate import onnx_runnable
from vitq.models import load
from vitq.rewrites import prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench") / "model")


def test_the_float_file_computes_the_model(model: Path, tmp_path: Path):
    loaded = load(str(model))
    export_float(prepare(loaded)[0], tmp_path / "float.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]  # the weights are in it
    for batch in (1, 3):
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            torch.testing.assert_close(onnx_runnable(tmp_path / "float.onnx")(images), loaded.module(images), rtol=1e-4, atol=1e-4)


def test_more_images_take_longer(model: Path, tmp_path: Path):
    file = tmp_path / "float.onnx"
    export_float(prepare(load(str(model)))[0], file)
    (one,) = latencies([file], torch.zeros(1, 3, 32, 32), rounds=15, warmup=3)
    first, second = latencies([file, file], torch.zeros(64, 3, 32, 32), rounds=15, warmup=3)
    assert 4 * one.median_ms < min(first.median_ms, second.median_ms)
    assert 0 < first.median_ms <= first.p90_ms


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.onnx does not exist; `vitq export` writes it"):
        latencies([tmp_path / "gone.onnx"], torch.zeros(1, 3, 32, 32))
