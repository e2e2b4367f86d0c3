"""Which layers onnxruntime really runs as integer kernels, read from the graph that it optimised.

A fused node keeps the name of the MatMul that it came from, which is the layer's name.
"""

import tempfile
from pathlib import Path

import onnx

from vitq.runtime import open_session

INTEGER_KERNELS = {"MatMulIntegerToFloat", "QGemm", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul", "QAttention"}


def optimised_graph(model: Path | bytes) -> onnx.GraphProto:
    """The graph that onnxruntime makes of a file or a serialized model on this machine."""
    with tempfile.TemporaryDirectory(prefix="vitq-") as folder:
        path = Path(folder) / "optimised.onnx"
        open_session(model, optimised=path)
        return onnx.load(path, load_external_data=False).graph


def integer_layers(model: Path | bytes) -> set[str]:
    """Names of the layers that became integer kernels."""
    return {node.name for node in optimised_graph(model).node if node.op_type in INTEGER_KERNELS}
