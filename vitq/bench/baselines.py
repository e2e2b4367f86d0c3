"""What a quantized file is compared with: the float32 file, and what onnxruntime's own two quantizers make of it.

The float32 file is torch's own export at opset 21 (Gelu is one op from 20 on) without shape hints, with which onnxruntime reuses less
memory: up to a tenth of its time at batch 8. Slimming it (onnxslim) gains nothing on top (docs/log.md).
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitq.errors import InputError
from vitq.graph import Graph, capture
from vitq.models import LoadedModel
from vitq.whole import write_whole

OPSET = 21
BASELINES = ("float32", "quantize_dynamic", "quantize_static")
"""The rows that `--baselines` adds."""


def write_baselines(model: LoadedModel, images: Tensor, folder: Path) -> dict[str, Path]:
    """Writes a file for each of `BASELINES` into a folder; returns them by name.

    Args:
        model: the float model.
        images: (B, 3, H, W), preprocessed, for the ranges of `quantize_static`; a few do, since they do not change its speed.
        folder: where to write.

    Raises:
        InputError: torch.onnx or onnxruntime's quantizers cannot express the model.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([{"images": np.ascontiguousarray(images.numpy())}])

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            return next(self.feeds, None)

    channels, height, width = model.data_config["input_size"]
    files = {name: folder / f"{name}.onnx" for name in BASELINES}
    export_float(capture(model.module, (channels, height, width)), files["float32"])
    source = files["float32"]
    with _reported("quantize_dynamic"):
        quantize_dynamic(source, files["quantize_dynamic"], per_channel=True, weight_type=QuantType.QInt8)
    with _reported("quantize_static"):
        target = files["quantize_static"]
        quantize_static(source, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    return files


def export_float(graph: Graph, path: Path) -> None:
    """Writes a graph as it is, in float32, by torch's own exporter: opset 21, dynamic batch, input `images`, output `output`.

    Raises:
        InputError: torch.onnx cannot express some op of the graph.
    """
    example = torch.zeros(2, *graph.input_shape)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(graph.module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=["images"],
                output_names=["output"],
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(
            f"torch.onnx cannot express this model at opset {OPSET}: {reason}; there is no float32 file to compare with"
        ) from None
    assert exported is not None
    proto = exported.model_proto
    del proto.graph.value_info[:]
    write_whole(path, lambda temporary: temporary.write_bytes(proto.SerializeToString()))


@contextmanager
def _reported(quantizer: str) -> Iterator[None]:
    """Turns whatever onnxruntime's quantizers raise into an InputError, and keeps their advice off stderr."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    except Exception as error:  # many kinds; each means that this model has no such baseline
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"onnxruntime's {quantizer} cannot quantize this model: {reason}; leave --baselines out") from None
    finally:
        logging.disable(disabled)
