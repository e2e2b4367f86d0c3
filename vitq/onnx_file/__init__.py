"""From a calibrated checkpoint to an ONNX file of Q/DQ pairs that onnxruntime runs with integer kernels.

    split, fold numbers -> trace (float ops, one node a layer) -> lower (Q/DQ, codes) -> finish (names, metadata) -> verify -> write

The file appears only after it was run and compared with the checkpoint. Opens no image file: it is given batches to verify on.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import Tensor

from vitq.checkpoint import Checkpoint
from vitq.choices import OPSETS
from vitq.errors import UsageError
from vitq.onnx_file.factors import fold_numbers
from vitq.onnx_file.file import data_file, folder_beside, place, store
from vitq.onnx_file.finish import finish_file
from vitq.onnx_file.kernels import integer_layers
from vitq.onnx_file.lowering import integer_quantizer, lower
from vitq.onnx_file.split import split_linears
from vitq.onnx_file.storage import STORAGES, Storage, is_symmetric, stored_bytes
from vitq.onnx_file.trace import OPSET, trace_graph
from vitq.onnx_file.verify import verify_file
from vitq.runtime import INT8_ALLOWED
from vitq.units import counted
from vitq.whole import refuse_existing

__all__ = ["ExportReport", "Storage", "export", "refuse_unwritten", "stored_bytes"]


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
    checkpoint: Checkpoint,
    path: str | Path,
    batches: Iterable[Tensor],
    storage: Storage = "packed",
    force: bool = False,
    *,
    attention_int8: bool = False,
    opset: int = OPSET,
    batch: int | None = None,
    progress: Callable[[float, float, str], None] | None = None,
) -> ExportReport:
    """Writes and verifies an ONNX file (input `images` (B, 3, H, W) float32, output `output`).

    A file whose tensors take more than 2 GB is written as two, `model.onnx` and `model.onnx.data`.

    Args:
        checkpoint: the calibrated model.
        path: the file to write.
        batches: preprocessed images to verify on, each (B, 3, H, W) float32.
        storage: how weights lie in the file: "packed", "standard" or "fast".
        force: replace an existing file.
        attention_int8: keys and values as int8 in place of uint8. The file is faster in a session with the option that its
            metadata name (`vitq.session_options`), and computes the same without.
        opset: of ONNX, 21 to 25.
        batch: the number of images that the file takes; None for any.
        progress: is told (stages begun, all of them, what is done) as each begins.

    Raises:
        UsageError: the file exists and `force` is not set, an unknown storage or opset, "standard" for weights that have zero points, or
            quantizers that integer kernels do not read.
        InputError: the model cannot be expressed in ONNX, there are no images, or the place cannot be written to.
        VerificationError: the file does not compute what was calibrated; it is not written.
    """
    started = time.perf_counter()
    path = Path(path)
    refuse_unwritten(checkpoint, storage, opset, batch)
    refuse_existing(path, force)
    told = _stages(progress)
    told("trace")
    split, became = split_linears(checkpoint)
    written = fold_numbers(split)
    model = trace_graph(written.graph, opset, batch)
    told("lower")
    layers = lower(model, written, storage, attention_int8)
    needed = INT8_ALLOWED if any(less > 0 for layer in layers for less in layer.lessened) else {}
    file = finish_file(model, layers, checkpoint, needed)
    with folder_beside(path) as folder:
        told("write")
        stored = folder / path.name
        store(file, stored)
        onnx.checker.check_model(str(stored))
        told("verify")
        agreement = verify_file(file, layers, written, batches, checkpoint, needed, folder)
        told("kernels")
        fused = integer_layers(stored)
        file_bytes = sum(part.stat().st_size for part in (stored, data_file(stored)) if part.exists())
        place(stored, path)
    weights = [(weight.bits, weight.codes.numel(), len(weight.scale)) for weight in written.weights.values()]
    candidates = [layer.name for layer in checkpoint.graph.layers if layer.op in ("linear", "matmul")]
    not_fused = tuple(name for name in candidates if not fused.issuperset(became[name]))
    return ExportReport(
        file_bytes=file_bytes,
        planned_weight_bytes=-(-sum(bits * elements for bits, elements, _ in weights) // 8),
        weight_bytes=sum(stored_bytes(bits, elements, channels, storage, opset) for bits, elements, channels in weights),
        quantized_layers=len(checkpoint.graph.layers),
        integer_candidates=len(candidates),
        integer_kernels=len(candidates) - len(not_fused),
        float_by_choice=len(checkpoint.graph.layers) - len(candidates),
        top1_agreement=agreement.top1,
        code_mismatch=agreement.code_mismatch,
        seconds=time.perf_counter() - started,
        not_fused=not_fused,
    )


_STAGES = ("trace", "lower", "write", "verify", "kernels")


def _stages(progress: Callable[[float, float, str], None] | None) -> Callable[[str], None]:
    """What is told the name of each stage as it begins."""
    whole = len(_STAGES)

    def told(stage: str) -> None:
        if progress:
            begun = 1 + _STAGES.index(stage)
            progress(begun, whole, f"{begun} of {whole}, {stage}")

    return told


def refuse_unwritten(checkpoint: Checkpoint, storage: str = "packed", opset: int = OPSET, batch: int | None = None) -> None:
    """Raises UsageError for what `export`, whose arguments these are, does not write; traces nothing."""
    if storage not in STORAGES:
        raise UsageError(f"storage {storage!r} is not known; give one of {', '.join(STORAGES)}")
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not written; give one from {OPSETS[0]} to {OPSETS[-1]}")
    if batch is not None and batch < 1:
        raise UsageError(f"a batch of {batch} images is none; give 1 or more, or dynamic")
    asymmetric = [name for name, weight in checkpoint.weights.items() if not is_symmetric(weight)]
    if storage == "standard" and asymmetric:
        raise UsageError(
            f"storage standard takes weights without zero points, those of {counted(len(asymmetric), 'layer')} have some "
            f"({asymmetric[0]}); run `vitq calibrate --symmetric --force`, or give --storage packed"
        )
    for operand in (operand for layer in checkpoint.graph.layers for operand in layer.activations):
        integer_quantizer(checkpoint, operand)
