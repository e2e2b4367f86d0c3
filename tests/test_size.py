"""The size that `allocate` predicts is the size of the file that `export` writes."""

from itertools import cycle

import pytest
import torch
from families import FAMILIES, random_model

from vitq.allocation.sizes import stored_bytes
from vitq.artifacts import WIDTHS, BitPlan, LayerBits
from vitq.calibration.fast import calibrate_fast
from vitq.importance import rest_bytes
from vitq.models import load
from vitq.onnx_file import export
from vitq.ranges import fold
from vitq.rewrites import prepare


@pytest.mark.parametrize(
    "name", ["the demo's model", pytest.param("swin", marks=pytest.mark.slow), pytest.param("deit", marks=pytest.mark.slow)]
)
def test_predicted_size_is_the_size_of_the_file(name, demo_data, tmp_path):
    model = load(str(demo_data / "vit_cifar10")) if name == "the demo's model" else random_model(*FAMILIES[name])
    graph, spec = prepare(model)
    images = torch.randn(4, *model.data_config["input_size"], generator=torch.Generator().manual_seed(0))
    folded, _ = fold(graph, [(images, None)])
    widths = cycle(WIDTHS)
    entries = [
        LayerBits(name=layer.name, type=layer.type, weight_bits=width if layer.has_weight else None, activation_bits=width)
        for layer, width in zip(graph.layers, widths, strict=False)
    ]
    checkpoint = calibrate_fast(graph, BitPlan(model=spec, layers=tuple(entries)), [(images, None)])
    report = export(checkpoint, tmp_path / "model.onnx", [images])
    predicted = rest_bytes(folded) + sum(
        stored_bytes(layer, entry.weight_bits, entry.activation_bits) for layer, entry in zip(graph.layers, entries, strict=True)
    )
    assert (tmp_path / "model.onnx").stat().st_size == report.file_bytes
    assert predicted == pytest.approx(report.file_bytes, rel=0.01)
