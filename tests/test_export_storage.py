"""Weights in the file: what onnxruntime unpacks is what was stored, at every width, and costs nothing when the model runs."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vitq.affine import QuantizedWeight, weight_codes
from vitq.onnx_file.kernels import optimised_graph
from vitq.onnx_file.storage import (
    STORAGES,
    Storage,
    function_name,
    is_symmetric,
    plane_widths,
    stored_bytes,
    unpack_function,
    weight_tensors,
)

WIDTHS = range(2, 9)


def random_weight(bits: int, shape: tuple[int, ...], seed: int = 0, symmetric: bool = False) -> QuantizedWeight:
    rng = np.random.default_rng(seed)
    low, high = weight_codes(bits)
    zero_point = np.full(shape[0], 2 ** (bits - 1)) if bits >= 7 or symmetric else rng.integers(0, 2**bits, shape[0])
    return QuantizedWeight(
        torch.from_numpy(rng.integers(low, high + 1, shape).astype(np.uint8)),
        torch.from_numpy(rng.uniform(0.01, 0.02, shape[0]).astype(np.float32)),
        torch.from_numpy(zero_point.astype(np.uint8)),
        bits,
    )


def integers_by_definition(weight: QuantizedWeight) -> np.ndarray:
    codes, zero_point = weight.codes.numpy().astype(int), weight.zero_point.numpy().astype(int)
    return np.stack([row - zero for row, zero in zip(codes, zero_point, strict=True)])


def stored(
    weight: QuantizedWeight, storage: Storage, transposed: bool
) -> tuple[list[TensorProto], list[onnx.NodeProto], list[onnx.FunctionProto]]:
    """Initializers, the node that makes `integers` of them, and its function."""
    bits, tensors = weight_tensors(weight, storage, transposed)
    protos = [ir.to_proto(tensor) for tensor in tensors]
    for index, proto in enumerate(protos):
        proto.name = f"i{index}"
    if len(protos) == 1:
        protos[0].name = "integers"
        return protos, [], []
    node = helper.make_node(function_name(bits), [proto.name for proto in protos], ["integers"], domain="vitq")
    function = unpack_function(bits, 21)
    for index, value in enumerate([*function.inputs, *(value for inner in function for value in inner.outputs)]):
        value.name = f"v{index}"
    return protos, [node], [ir.to_proto(function)]


def model_of(nodes: list[onnx.NodeProto], inputs: list, output: onnx.ValueInfoProto, initializers: list, functions: list) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, [output], initializers)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("vitq", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def unpacked(weight: QuantizedWeight, storage: Storage, transposed: bool, optimised: bool) -> np.ndarray:
    initializers, nodes, functions = stored(weight, storage, transposed)
    shape = weight.codes.shape[::-1] if transposed else weight.codes.shape
    nodes = [*nodes, helper.make_node("Cast", ["integers"], ["out"], to=TensorProto.INT32)]
    content = model_of(nodes, [], helper.make_tensor_value_info("out", TensorProto.INT32, shape), initializers, functions)
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, {})[0]


@pytest.mark.parametrize("optimised", [True, False])
@pytest.mark.parametrize("storage", list(STORAGES))
@pytest.mark.parametrize("bits", WIDTHS)
def test_onnxruntime_unpacks_what_was_stored(bits: int, storage: Storage, optimised: bool) -> None:
    linear, convolution = (random_weight(bits, shape, symmetric=storage == "standard") for shape in ((24, 40), (16, 4, 3, 3)))
    assert np.array_equal(unpacked(linear, storage, True, optimised), integers_by_definition(linear).T)
    assert np.array_equal(unpacked(convolution, storage, False, optimised), integers_by_definition(convolution))


@settings(max_examples=40)
@given(st.sampled_from(WIDTHS), st.integers(1, 19), st.integers(1, 19), st.sampled_from(sorted(STORAGES)), st.integers(0, 2**32 - 1))
def test_any_shape_is_stored_exactly_in_the_bytes_that_were_promised(
    bits: int, outputs: int, inputs: int, storage: Storage, seed: int
) -> None:
    weight = random_weight(bits, (outputs, inputs), seed, storage == "standard")
    assert np.array_equal(unpacked(weight, storage, True, True), integers_by_definition(weight).T)
    _, tensors = weight_tensors(weight, storage, True)
    in_file = sum(len(ir.to_proto(tensor).raw_data) for tensor in tensors if tensor.dtype != ir.DataType.INT64) + 4 * outputs
    assert in_file == stored_bytes(bits, outputs * inputs, outputs, storage)


@pytest.mark.parametrize("bits", WIDTHS)
def test_packed_codes_take_exactly_their_bits(bits: int) -> None:
    assert sum(plane_widths(bits, 8 * 15, "packed")) == bits
    assert stored_bytes(bits, 8 * 15, 8, "packed") == 15 * bits + 8 * (4 if bits == 8 else 5)
    assert sum(plane_widths(bits, 8 * 15, "standard")) == (4 if bits <= 4 else 8)
    assert sum(plane_widths(bits, 8 * 15, "fast")) == 8


@pytest.mark.parametrize("bits", WIDTHS)
def test_standard_is_a_signed_type_and_nothing_else(bits: int) -> None:
    weight = random_weight(bits, (24, 40), symmetric=True)
    _, (tensor,) = weight_tensors(weight, "standard", True)
    assert tensor.dtype == (ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8)
    assert np.array_equal(tensor.numpy().astype(int), integers_by_definition(weight).T)
    assert is_symmetric(weight)
    assert is_symmetric(random_weight(bits, (24, 40))) == (bits >= 7)


@pytest.mark.parametrize("storage", ["packed", "fast"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_folds_to_one_int8_initializer_and_the_integer_kernel_remains(bits: int, storage: Storage, tmp_path: Path) -> None:
    weight = random_weight(bits, (24, 40))
    initializers, nodes, functions = stored(weight, storage, True)
    constants = {"scale": np.float32(0.02), "zero": np.uint8(100), "weight_scale": weight.scale.numpy()}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        *nodes,
        helper.make_node("DequantizeLinear", ["integers", "weight_scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 7, 40])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 7, 24])
    initializers = [*initializers, *(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())]
    graph = optimised_graph(model_of(nodes, [x], y, initializers, functions))
    assert [node.op_type for node in graph.node] == ["QuantizeLinear", "MatMulIntegerToFloat"]
    folded = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}[graph.node[1].input[1]]
    assert folded.dtype == np.int8
    assert np.array_equal(folded, integers_by_definition(weight).T)
