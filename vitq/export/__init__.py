"""From a calibrated checkpoint to an ONNX file of Q/DQ pairs that onnxruntime runs with integer kernels.

    trace (float ops, one node a layer) -> lower (Q/DQ, codes) -> finish (names, metadata) -> verify -> write

The file appears only after it was run and compared with the checkpoint. Opens no image file: it is given batches to verify on.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vitq.artifacts import refuse_existing, write_whole
from vitq.checkpoint import Checkpoint
from vitq.errors import UsageError
from vitq.export.finish import finish_file
from vitq.export.kernels import integer_layers
from vitq.export.lowering import lower
from vitq.export.storage import STORAGES, Storage, is_symmetric, stored_bytes
from vitq.export.trace import trace_graph
from vitq.export.verify import verify_file

__all__ = ["ExportReport", "Storage", "export", "stored_bytes"]


@dataclass(frozen=True)
class ExportReport:
    """What was written, in bytes, layers and agreement.

    `planned_weight_bytes` is parameters x bits / 8 over all layers; `weight_bytes` the same as stored, with scales and zero points.
    `integer_candidates` counts the linears and matmuls, `integer_kernels` those of them that onnxruntime fused (`not_fused` names the
    others), `float_by_choice` the convolutions. `top1_agreement` is percent of the images, with the fake-quantized model;
    `code_mismatch` the fraction of codes that differ beyond rounding ties.
    """

    file_bytes: int
    planned_weight_bytes: int
    weight_bytes: int
    quantized_layers: int
    integer_candidates: int
    integer_kernels: int
    float_by_choice: int
    top1_agreement: float
    code_mismatch: float
    seconds: float
    not_fused: tuple[str, ...] = ()


def export(
    checkpoint: Checkpoint, path: str | Path, batches: Iterable[Tensor], storage: Storage = "packed", force: bool = False
) -> ExportReport:
    """Writes and verifies an ONNX file (opset 21, dynamic batch, input `images` (B, 3, H, W) float32, output `output`).

    Args:
        checkpoint: the calibrated model.
        path: the file to write.
        batches: preprocessed images to verify on, each (B, 3, H, W) float32.
        storage: how weights lie in the file: "packed", "standard" or "fast".
        force: replace an existing file.

    Raises:
        UsageError: the file exists and `force` is not set, an unknown storage, or "standard" for weights that have zero points.
        InputError: the model cannot be expressed in ONNX, or there are no images.
        VerificationError: the file does not compute what was calibrated; it is not written.
    """
    started = time.perf_counter()
    if storage not in STORAGES:
        raise UsageError(f"storage {storage!r} is not known; give one of {', '.join(STORAGES)}")
    asymmetric = [name for name, weight in checkpoint.weights.items() if not is_symmetric(weight)]
    if storage == "standard" and asymmetric:
        raise UsageError(
            f"storage standard takes weights without zero points, those of {len(asymmetric)} layers have some ({asymmetric[0]}); "
            "run `vitq calibrate --symmetric --force`, or give --storage packed"
        )
    refuse_existing(path, force)
    model = trace_graph(checkpoint.graph)
    layers = lower(model, checkpoint, storage)
    file = finish_file(model, layers, checkpoint)
    agreement = verify_file(file, layers, checkpoint, batches)
    content = file.SerializeToString()
    candidates = [layer.name for layer in checkpoint.graph.layers if layer.op in ("linear", "matmul")]
    fused = integer_layers(content)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
    weights = [(weight.bits, weight.codes.numel(), len(weight.scale)) for weight in checkpoint.weights.values()]
    return ExportReport(
        file_bytes=len(content),
        planned_weight_bytes=-(-sum(bits * elements for bits, elements, _ in weights) // 8),
        weight_bytes=sum(stored_bytes(bits, elements, channels, storage) for bits, elements, channels in weights),
        quantized_layers=len(checkpoint.graph.layers),
        integer_candidates=len(candidates),
        integer_kernels=sum(name in fused for name in candidates),
        float_by_choice=len(checkpoint.graph.layers) - len(candidates),
        top1_agreement=agreement.top1,
        code_mismatch=agreement.code_mismatch,
        seconds=time.perf_counter() - started,
        not_fused=tuple(name for name in candidates if name not in fused),
    )
