"""Which layers onnxruntime really runs as integer kernels, read from the graph that it optimised.

A fused node keeps the name of the MatMul that it came from, which is the layer's name.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from vitq.processor import processor

PROVIDER = "CPUExecutionProvider"
OPTIMISATION = "ORT_ENABLE_ALL"
SETTINGS = {"session.intra_op.allow_spinning": "0"}  # torch runs beside it
INTEGER_KERNELS = {"MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "QAttention"}


def session(model: bytes, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU at full optimisation, onnxruntime's default; writes the optimised graph to `optimised` where given."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, OPTIMISATION)
    options.log_severity_level = 3  # it warns that an optimised graph is for this machine only
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model, options, providers=[PROVIDER])


def circumstances() -> dict[str, Any]:
    """What a session's results and kernels depend on, as JSON: the runtime, its provider and options, the processor."""
    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": PROVIDER,
        "session_options": {"graph_optimization_level": OPTIMISATION} | SETTINGS,
        "processor": asdict(processor()),
    }


def optimised_graph(model: bytes) -> onnx.GraphProto:
    """The graph that onnxruntime makes of a serialized model on this machine."""
    with tempfile.TemporaryDirectory(prefix="vitq-") as folder:
        path = Path(folder) / "optimised.onnx"
        session(model, path)
        return onnx.load(path).graph


def integer_layers(model: bytes) -> set[str]:
    """Names of the layers that became integer kernels."""
    return {node.name for node in optimised_graph(model).node if node.op_type in INTEGER_KERNELS}
