"""Predicted bytes of one layer in a packed ONNX file, from its shape and its widths alone.

A layer's own bytes are its codes at their true width, one float32 scale an output channel, one zero point an output channel where
the weight is asymmetric (below 8 bits), and the nodes and small constants that unpack and dequantize them. Left out: biases, other
float tensors and the rest of the graph, which a profile holds as `rest_bytes`.
"""

from vitq.artifacts import Layer

SCALE_BYTES = 4
ZERO_POINT_BYTES = 1

# Nodes, names and small constants of a layer, by the width of its weight (of its inputs for a matmul).
# Measured by the exporter's test, which fails when a file's real size leaves the prediction.
GRAPH_BYTES = {2: 700, 3: 700, 4: 700, 5: 700, 6: 700, 7: 700, 8: 700}


def stored_bytes(layer: Layer, weight_bits: int | None, activation_bits: int) -> int:
    """The bytes that a layer takes in a packed file.

    Args:
        layer: the layer.
        weight_bits: 2 to 8; None for a matmul.
        activation_bits: 2 to 8.
    """
    if weight_bits is None:
        return GRAPH_BYTES[activation_bits]
    codes = -(-layer.parameters * weight_bits // 8)
    qparams = layer.channels * (SCALE_BYTES + (ZERO_POINT_BYTES if weight_bits < 8 else 0))
    return codes + qparams + GRAPH_BYTES[weight_bits]
