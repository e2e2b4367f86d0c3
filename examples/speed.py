"""How fast and how large exported files are, against float32 and against what onnxruntime's own quantizers make of the model.

    python examples/speed.py [deit_small_patch16_224] [--batch 1 8] [--threads 1] [--rounds 60]

Weights are made up: speed does not depend on them. 4/4 is the slowest that a plan can be: all activations are below 8 bits, every softmax
is quantized by its logarithm. All files are run in turn; `times` is the float32 file's median over this one's. Load time is that of a
process of its own. `over` is what a packed file takes beyond its float tensors and parameters x bits / 8, in percent of the float32 file.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from vitq.artifacts import ModelSpec
from vitq.bench import compare, footprint
from vitq.bench.baselines import write_baselines
from vitq.graph import capture
from vitq.models import LoadedModel, build
from vitq.onnx_file.kernels import integer_layers
from vitq.onnx_file.timing import made_up, whole_file
from vitq.rewrites import fold_layernorms, rewrite

SHAPE = (3, 224, 224)
WIDTHS = (2, 3, 4, 6, 8)


def main() -> None:
    """Prints two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="deit_small_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    module = build(arguments.model, {}, 1000)
    for parameter in module.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    data_config = {"input_size": list(SHAPE)}
    graph = rewrite(capture(module, SHAPE))
    spec = ModelSpec(architecture=arguments.model, num_classes=1000, data_config=data_config, graph_digest=graph.digest)
    graph = fold_layernorms(graph)
    weights = {layer.operands[1].tensor for layer in graph.layers if layer.has_weight}
    floats = sum(value.nbytes for name, value in graph.module.state_dict().items() if name not in weights)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        loaded = LoadedModel(module, arguments.model, {}, 1000, data_config, (), arguments.model, "")
        files = write_baselines(loaded, torch.randn(1, *SHAPE), folder)
        for bits in (8, 4):
            for attention_int8 in (False, True):
                name = f"{bits}/{bits}{' --attention-int8' if attention_int8 else ''}"
                files[name] = folder / f"{bits}{attention_int8}.onnx"
                files[name].write_bytes(whole_file(made_up(graph, spec, bits, bits), "packed", attention_int8))
        kernels = integer_layers(files["8/8"])
        print(f"{arguments.model}: {len(graph.layers)} layers, {len(kernels)} integer kernels\n")
        print("| file | batch | threads | median ms | times |\n| --- | --- | --- | --- | --- |")
        for row in compare(files, arguments.batch, arguments.threads, arguments.rounds):
            print(f"| {row.name} | {row.batch} | {row.threads} | {row.median_ms:.2f} | {row.speedup:.2f} |", flush=True)
        print("\n| weight bits | file bytes | over % | load ms |\n| --- | --- | --- | --- |")
        float32 = files["float32"].stat().st_size
        for bits in WIDTHS:
            checkpoint = made_up(graph, spec, 8, bits)
            packed = folder / "packed.onnx"
            packed.write_bytes(whole_file(checkpoint, "packed"))
            size = packed.stat().st_size
            ideal = floats + sum(weight.codes.numel() for weight in checkpoint.weights.values()) * bits / 8
            load_ms = footprint(packed, (1, *SHAPE), 2).load_ms
            print(f"| {bits} | {size} | {100 * (size - ideal) / float32:.2f} | {load_ms:.0f} |", flush=True)


if __name__ == "__main__":
    main()
