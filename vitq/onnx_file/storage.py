"""Weights at their true width in the file: codes to initializers, and the ONNX functions that unpack them when a session is made.

    codes - zero_point (int8)  =  Cast(Cast(u, int32) - Cast(zero_point, int32), int8)      u = the planes of a code, joined by shift and or

A width is a sum of 4-, 2- and 1-bit *planes*, highest bits first: 7 = 4 + 2 + 1. A 4-bit plane is a uint4 tensor; the 2- and 1-bit
planes lie 4 and 8 to a byte, the j-th part of the flattened codes at the j-th bits of the bytes, so that shifts run over whole rows.
Unpacking is one call of a model-local function (`vitq.unpack3(planes, zero_point, shape)`), which onnxruntime inlines and folds to one
int8 initializer: the graph that runs is the same at every width. Eight bits, and everything in storage "fast", is int8 as it is.

Storage "standard" is for other runtimes: DequantizeLinear reads int8, int4 or, from opset 25 on, int2 as it is, so the weights must be
symmetric, codes less 2^(bits - 1). onnxruntime makes no integer kernel of int4 and int2.

Leaves out: the scales, which DequantizeLinear applies; see lowering.py.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vitq.affine import QuantizedWeight

Storage = Literal["packed", "fast", "standard"]
STORAGES: dict[str, str] = {
    "packed": "every width at its true size",
    "standard": "int2 (opset 25), int4 or int8, whichever holds it, without any unpacking: for other runtimes",
    "fast": "int8, nothing to unpack when a session is made",
}

_DOMAIN = "vitq"
_SIGNED: dict[tuple[int, ...], ir.DataType] = {(2,): ir.DataType.INT2, (4,): ir.DataType.INT4, (8,): ir.DataType.INT8}
_OPSET_OF_INT2 = 25
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def plane_widths(bits: int, elements: int, storage: Storage, opset: int = 21) -> tuple[int, ...]:
    """The planes that hold a weight of `elements` codes, highest first; (8,) is plain int8.

    Packed planes of 2 and 1 bits need a multiple of 8 elements; a weight of another size takes the next of 4 and 8 bits.
    """
    if storage == "packed" and (elements % 8 == 0 or bits == 4):
        return _PLANES[bits]
    if storage == "standard" and bits == 2 and opset >= _OPSET_OF_INT2:
        return (2,)
    return (4,) if bits <= 4 and storage != "fast" else (8,)


def stored_bytes(bits: int, elements: int, channels: int, storage: Storage, opset: int = 21) -> int:
    """Bytes of a weight's codes, zero points (where the file needs them) and float32 scales."""
    planes = plane_widths(bits, elements, storage, opset)
    return -(-elements * sum(planes) // 8) + channels * (4 if planes == (8,) or storage == "standard" else 5)


def is_symmetric(weight: QuantizedWeight) -> bool:
    """Whether the zero point of every channel is 2^(bits - 1), so that the integers are those of a signed type."""
    return bool((weight.zero_point == 2 ** (weight.bits - 1)).all())


def weight_tensors(weight: QuantizedWeight, storage: Storage, transposed: bool, opset: int = 21) -> tuple[int, list[ir.TensorProtocol]]:
    """What the file stores of a weight's codes.

    Args:
        weight: codes (O, ...).
        storage: how to hold them.
        transposed: store (K, N) instead of (O, I) = (N, K).
        opset: of the file.

    Returns:
        The stored bits, and the inputs of `unpack_function(bits)`: its planes, zero points and shape; or one tensor alone, int8, int4 or
        int2, which needs none.
    """
    codes = weight.codes.cpu().numpy()
    planes = plane_widths(weight.bits, codes.size, storage, opset)
    if planes == (8,) or storage == "standard":
        integers = weight.integers().cpu().numpy()
        integers = np.ascontiguousarray(integers.T if transposed else integers)
        return sum(planes), [ir.tensor(integers, dtype=_SIGNED[planes])]
    codes = np.ascontiguousarray(codes.T if transposed else codes)
    zero_point = weight.zero_point.cpu().numpy()
    zero_point = zero_point if transposed else zero_point.reshape(-1, *[1] * (codes.ndim - 1))
    inputs: list[ir.TensorProtocol] = []
    shift = sum(planes)
    for width in planes:
        shift -= width
        inputs.append(_plane((codes >> shift) & (2**width - 1), width))
    inputs.append(ir.tensor(zero_point))
    if planes != (4,):
        inputs.append(ir.tensor(np.array(codes.shape, np.int64)))
    return sum(planes), inputs


def _plane(values: NDArray[np.uint8], width: int) -> ir.TensorProtocol:
    if width == 4:
        return ir.tensor(values, dtype=ir.DataType.UINT4)
    parts = values.reshape(8 // width, -1)  # (parts, bytes)
    packed = np.zeros(parts.shape[1], np.uint8)
    for index, part in enumerate(parts):
        packed |= part << np.uint8(width * index)
    return ir.tensor(packed)


def function_name(bits: int) -> str:
    """The name, in domain "vitq", of the function that unpacks codes of `bits` stored bits."""
    return f"unpack{bits}"


def unpack_function(bits: int, opset: int) -> ir.Function:
    """(planes..., zero_point uint8, shape int64) -> codes - zero_point as int8; no shape at 4 bits, whose plane has it."""
    planes = _PLANES[bits]
    inputs = [ir.Value(name=f"p{width}") for width in planes] + [ir.Value(name="zero_point")]
    shape = ir.Value(name="shape")
    inputs += [shape] if planes != (4,) else []
    tape = ir.tape.Tape()
    codes: ir.Value | None = None
    for width, plane in zip(planes, inputs, strict=False):
        part = tape.op("Cast", [plane], {"to": ir.DataType.UINT8}) if width == 4 else _unpacked_plane(tape, plane, width, shape)
        codes = (
            part
            if codes is None
            else tape.op("BitwiseOr", [tape.op("BitShift", [codes, _constant(tape, width)], {"direction": "LEFT"}), part])
        )
    assert codes is not None
    zero_point = inputs[len(planes)]
    difference = tape.op("Sub", [tape.op("Cast", [value], {"to": ir.DataType.INT32}) for value in (codes, zero_point)])
    result = tape.op("Cast", [difference], {"to": ir.DataType.INT8})
    graph = ir.Graph(inputs, [result], nodes=tape.nodes, opset_imports={"": opset})
    return ir.Function(_DOMAIN, function_name(bits), graph=graph, attributes=())


def _unpacked_plane(tape: "ir.tape.Tape", plane: ir.Value, width: int, shape: ir.Value) -> ir.Value:
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]  # (parts, 1) against (bytes,)
    parts = tape.op("BitShift", [plane, _constant(tape, shifts)], {"direction": "RIGHT"})
    return tape.op("Reshape", [tape.op("BitwiseAnd", [parts, _constant(tape, 2**width - 1)]), shape])


def _constant(tape: "ir.tape.Tape", value: int | Sequence[int] | NDArray[np.uint8]) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.asarray(value, np.uint8))})
