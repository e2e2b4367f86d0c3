"""How fast an exported model is against the fastest float32 graph that onnxruntime runs of it.

    python examples/speed.py [deit_small_patch16_224] [--bits 8] [--batch 1] [--threads 1]

The model's weights are random: speed does not depend on them. The float32 file is the timm model as torch.onnx exports it at opset 21,
slimmed by onnxslim and without value_info, which is the fastest form that we found. Runs are interleaved; the ratio is of medians.
"""

import argparse
import json
import tempfile
from pathlib import Path

import onnx
import onnxslim
import torch

from vitq.artifacts import BitPlan, LayerBits, ModelSpec
from vitq.bench import latencies
from vitq.calibration.fast import calibrate_fast
from vitq.export import export
from vitq.graph import capture
from vitq.models import build
from vitq.rewrites import rewrite


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = build(arguments.model, {}, 1000)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    graph = rewrite(capture(model, (3, 224, 224)))
    images = torch.randn(4, 3, 224, 224)
    bits = arguments.bits
    layers = tuple(
        LayerBits(name=layer.name, type=layer.type, weight_bits=bits if layer.has_weight else None, activation_bits=bits)
        for layer in graph.layers
    )
    data_config = {"input_size": [3, 224, 224]}
    spec = ModelSpec(architecture=arguments.model, num_classes=1000, data_config=data_config, graph_digest=graph.digest)
    checkpoint = calibrate_fast(graph, BitPlan(model=spec, layers=layers), [(images, None)])
    with tempfile.TemporaryDirectory() as folder:
        float32, quantized = Path(folder) / "float32.onnx", Path(folder) / "quantized.onnx"
        example = (torch.zeros(2, 3, 224, 224),)
        torch.onnx.export(
            model, example, dynamo=True, opset_version=21, dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False
        ).save(float32)
        slim = onnxslim.slim(onnx.load(float32))
        del slim.graph.value_info[:]
        onnx.save(slim, float32)
        report = export(checkpoint, quantized, [images])
        batch = torch.randn(arguments.batch, 3, 224, 224)
        before, after = latencies([float32, quantized], batch, arguments.rounds, threads=arguments.threads)
    print(
        json.dumps(
            {
                "model": arguments.model,
                "bits": arguments.bits,
                "batch": arguments.batch,
                "threads": arguments.threads,
                "float32_ms": round(before.median_ms, 2),
                "quantized_ms": round(after.median_ms, 2),
                "speedup": round(before.median_ms / after.median_ms, 2),
                "integer_kernels": f"{report.integer_kernels} / {report.integer_candidates}",
            }
        )
    )


if __name__ == "__main__":
    main()
