"""Predicted bytes of one layer in a packed ONNX file, from its shape and its widths alone.

A layer's own bytes are its codes at their true width, one float32 scale an output channel, one zero point an output channel where
the weight is asymmetric (below 8 bits), and the nodes, names, digests and small constants that unpack, quantize and dequantize. Left
out: biases, other float tensors and the rest of the graph, which a profile holds as `rest_bytes`. The constants were measured on exported
files (docs/log.md); tests/test_size.py holds the prediction against real ones.
"""

from vitq.artifacts import Layer

SCALE_BYTES = 4
ZERO_POINT_BYTES = 1

NODE_BYTES = {"linear": 290, "matmul": 240, "convolution": 350}
NAME_BYTES = 2  # a character of the layer's name: as a node, and in the plan that the metadata hold
UNPACK_BYTES = {2: 52, 3: 76, 4: 47, 5: 77, 6: 78, 7: 102, 8: 0}
PARTS = {"qkv": 3, "kv": 2}  # linears that most such layers are written as
PART_BYTES = 150  # of each but one
CLIP_BYTES = 21  # an activation below 8 bits


def stored_bytes(layer: Layer, weight_bits: int | None, activation_bits: int) -> int:
    """The bytes that a layer takes in a packed file.

    Args:
        layer: the layer.
        weight_bits: 2 to 8; None for a matmul.
        activation_bits: 2 to 8.
    """
    graph = NODE_BYTES[layer.op] + NAME_BYTES * len(layer.name)
    if activation_bits < 8:
        graph += CLIP_BYTES * len(layer.activations)
    if weight_bits is None:
        return graph
    codes = -(-layer.parameters * _container(layer.parameters, weight_bits) // 8)
    qparams = layer.channels * (SCALE_BYTES + (ZERO_POINT_BYTES if weight_bits < 8 else 0))
    more = PARTS.get(layer.type, 1) - 1
    return graph + codes + qparams + UNPACK_BYTES[weight_bits] + more * (PART_BYTES + UNPACK_BYTES[weight_bits])


def _container(parameters: int, bits: int) -> int:
    """Bit planes need a multiple of 8 elements; other weights (small ones of odd shapes) lie in 4 or 8 bits."""
    if parameters % 8 == 0 or bits in (4, 8):
        return bits
    return 4 if bits < 4 else 8
