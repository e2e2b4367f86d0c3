"""From one node a layer to the Q/DQ pattern that onnxruntime turns into an integer kernel.

    linear        QuantizeLinear -> [Clip] -> DequantizeLinear -> MatMul(., DequantizeLinear(int8 [K, N])) -> Add(bias [1, 1, N])
    matmul        both operands QuantizeLinear -> [Clip] -> DequantizeLinear, then MatMul
                  of a softmax's rows of squares: then Div by the rows' sums, a MatMul with ones
    convolution   QuantizeLinear -> [Clip] -> Cast -> Sub(zero point) -> Conv with the float weight: a float kernel by choice

Activations are uint8 at every width: below 8 bits a Clip on the codes keeps them to 2^bits - 1, which costs little and keeps the
integer kernel. What is bounded below, as a GELU's output, needs none: its codes are stored 255 - (2^bits - 1) greater, where uint8
saturates by itself. With `attention_int8` the right operand of a matmul, keys or values, is int8 instead, each code 128 less: a faster
kernel, which onnxruntime takes only in a session that allows it. A tensor is quantized once for all its readers. The bias has three
axes because a bias of one lets onnxruntime make a float Gemm of MatMul and Add before it looks for integer kernels; a linear of rank 2
loses the extra axis again in a Squeeze. A convolution between DequantizeLinear and QuantizeLinear would have its float weight quantized
anew by onnxruntime, 8 bits per tensor: so it reads the codes as floats, and its weight carries both scales.

Leaves out: how codes lie in the file (storage.py), names and metadata of the finished file (finish.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitq.affine import QuantizedWeight, highest_code
from vitq.artifacts import Layer, Operand
from vitq.checkpoint import Checkpoint
from vitq.errors import UsageError
from vitq.onnx_file.storage import Storage, function_name, unpack_function, weight_tensors
from vitq.onnx_file.trace import DOMAIN
from vitq.quantizers import INTEGER_QUANTIZERS, IntegerQuantizer, RowSquares, TwinGrid, Uniform
from vitq.quantizers.twin_grid import TOP


@dataclass(frozen=True)
class LoweredLayer:
    """Where a layer's numbers are in the ONNX graph: its activations' codes, stored less the numbers in `lessened`, and its output."""

    layer: Layer
    codes: tuple[ir.Value, ...]
    lessened: tuple[int, ...]
    output: ir.Value


def lower(model: ir.Model, checkpoint: Checkpoint, storage: Storage, attention_int8: bool = False) -> tuple[LoweredLayer, ...]:
    """Replaces every `vitq` node of a traced model, in place.

    Args:
        model: from `trace_graph`.
        checkpoint: whose graph was traced.
        storage: how weights lie in the file.
        attention_int8: store the right operand of each matmul as int8 in place of uint8.

    Returns:
        Where each layer's numbers are, in the order of the graph.
    """
    layers = {layer.name: layer for layer in checkpoint.graph.layers}
    lowering = _Lowering(model, checkpoint, storage, attention_int8)
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    return tuple(lowering.replace(node, layers[node.attributes["layer"].as_string()]) for node in nodes)


class _Lowering:
    """The graph being edited, and what its layers share: constants, quantized tensors, unpacking functions."""

    def __init__(self, model: ir.Model, checkpoint: Checkpoint, storage: Storage, attention_int8: bool) -> None:
        self._model, self._checkpoint, self._attention_int8 = model, checkpoint, attention_int8
        self._storage: Storage = storage
        self._opset = model.opset_imports[""]
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._codes: dict[tuple[ir.Value, IntegerQuantizer, int], ir.Value] = {}
        self._dequantized: dict[tuple[ir.Value, IntegerQuantizer, int], ir.Value] = {}
        self._tape = ir.tape.Tape()

    def replace(self, node: ir.Node, layer: Layer) -> LoweredLayer:
        self._tape = ir.tape.Tape()
        inputs = [value for value in node.inputs if value is not None]
        operands, bias = inputs[: len(layer.activations)], inputs[len(layer.activations) :]
        quantizers = [integer_quantizer(self._checkpoint, operand) for operand in layer.activations]
        lessened = self._lessened(layer, quantizers)
        codes = [
            self._quantize(value, quantizer, operand.role, less)
            for value, quantizer, operand, less in zip(operands, quantizers, layer.activations, lessened, strict=True)
        ]
        if layer.op == "matmul":
            left, right = map(self._dequantize, codes, quantizers, lessened)
            output = self._tape.op("MatMul", [left, right], name=layer.name)
            if isinstance(quantizers[0], RowSquares):
                output = self._tape.op("Div", [output, self._row_sums(left, layer.operands[0].shape[-1])])
        elif layer.op == "linear":
            output = self._linear(layer, self._dequantize(codes[0], quantizers[0], lessened[0]), bias, rank=len(_shape(operands[0])))
        else:
            output = self._convolution(layer, codes[0], quantizers[0], lessened[0], bias, node)
        old = node.outputs[0]
        output.shape, output.type = old.shape, old.type
        self._model.graph.insert_before(node, self._tape.nodes)
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self._model.graph.remove(node, safe=True)
        return LoweredLayer(layer, tuple(codes), lessened, output)

    def _lessened(self, layer: Layer, quantizers: Sequence[IntegerQuantizer]) -> tuple[int, ...]:
        """By how much each operand's stored codes are less than they are: 128 as int8; negative at uint8's upper end."""
        right = self._attention_int8 and layer.op == "matmul" and isinstance(quantizers[1], Uniform)
        return tuple(
            128 if right and at == 1 else highest_code(quantizer.bits) - 255 if _saturates(quantizer, operand.role) else 0
            for at, (quantizer, operand) in enumerate(zip(quantizers, layer.activations, strict=True))
        )

    def _quantize(self, value: ir.Value, quantizer: IntegerQuantizer, role: str, less: int) -> ir.Value:
        """The integers of a tensor, made at its first reader."""
        if (value, quantizer, less) not in self._codes:
            if isinstance(quantizer, RowSquares):
                codes = self._squared(value, quantizer)
            elif isinstance(quantizer, TwinGrid):
                codes = self._in_two_steps(value, quantizer)
            else:
                codes = self._tape.op("QuantizeLinear", [value, *self._affine(quantizer.scale, quantizer.zero_point, less)])
                if less >= 0 and not _stays_below(quantizer, role):
                    codes = self._tape.op("Clip", [codes, None, self._constant(_code(highest_code(quantizer.bits), less))])
            self._codes[value, quantizer, less] = codes
        return self._codes[value, quantizer, less]

    def _squared(self, value: ir.Value, quantizer: RowSquares) -> ir.Value:
        """The integers of rows: the root of each value over its row's largest, rounded, times itself."""
        softmax, last = value.producer(), self._constant(np.array([-1]))
        if softmax is not None and softmax.op_type == "Softmax":
            scores = softmax.inputs[0]
            below = self._tape.op("Sub", [scores, self._tape.op("ReduceMax", [scores, last], {"keepdims": 1})])
            root = self._tape.op("Exp", [self._tape.op("Mul", [below, self._constant(np.float32(0.5))])])
        else:
            largest = self._tape.op("ReduceMax", [value, last], {"keepdims": 1})
            root = self._tape.op("Sqrt", [self._tape.op("Div", [value, largest])])
        step = self._affine(1 / highest_code(quantizer.bits), 0)
        rounded = self._tape.op("DequantizeLinear", [self._tape.op("QuantizeLinear", [root, *step]), *step])
        return self._tape.op("QuantizeLinear", [self._tape.op("Mul", [rounded, rounded]), *self._affine(quantizer.scale, 0)])

    def _row_sums(self, rows: ir.Value, length: int) -> ir.Value:
        """The sum of each row, as a product of integers with ones."""
        ones = self._constant(np.ones((length, 1), np.uint8))
        return self._tape.op("MatMul", [rows, self._tape.op("DequantizeLinear", [ones, *self._affine(1.0, 0)])])

    def _in_two_steps(self, value: ir.Value, quantizer: TwinGrid) -> ir.Value:
        """The grid's integers: rounded to the fine step and saturated below, then above the knee to the coarse one and saturated above."""
        coarse = float(np.float32(quantizer.scale) * np.float32(quantizer.ratio))
        fine, knee = self._affine(quantizer.scale, quantizer.zero_point), self._affine(quantizer.scale, quantizer.knee)
        codes = self._affine(coarse, TOP - (highest_code(quantizer.bits) - quantizer.knee))
        rounded = self._tape.op("DequantizeLinear", [self._tape.op("QuantizeLinear", [value, *fine]), *knee])
        stretched = self._tape.op("LeakyRelu", [rounded], {"alpha": float(quantizer.ratio)})
        rounded = self._tape.op("DequantizeLinear", [self._tape.op("QuantizeLinear", [stretched, *codes]), *codes])
        return self._tape.op("QuantizeLinear", [self._tape.op("LeakyRelu", [rounded], {"alpha": 1 / quantizer.ratio}), *knee])

    def _dequantize(self, codes: ir.Value, quantizer: IntegerQuantizer, less: int) -> ir.Value:
        if (codes, quantizer, less) not in self._dequantized:
            affine = self._affine(quantizer.scale, quantizer.zero_point, less)
            self._dequantized[codes, quantizer, less] = self._tape.op("DequantizeLinear", [codes, *affine])
        return self._dequantized[codes, quantizer, less]

    def _affine(self, scale: float, zero_point: int, less: int = 0) -> tuple[ir.Value, ir.Value]:
        return self._constant(np.float32(scale)), self._constant(_code(zero_point, less))

    def _linear(self, layer: Layer, x: ir.Value, bias: Sequence[ir.Value], rank: int) -> ir.Value:
        weight = self._checkpoint.weights[layer.name]
        integers = self._integers(weight, transposed=True)
        dequantized = self._tape.op("DequantizeLinear", [integers, self._constant(weight.scale.cpu().numpy())], {"axis": 1})
        output = self._tape.op("MatMul", [x, dequantized], name=layer.name)
        # A bias of zeros stays: onnxruntime makes no integer kernel of a MatMul whose result goes through a Relu to the next codes.
        values = _numpy(bias[0]) if bias else np.zeros(len(weight.scale), np.float32)
        output = self._tape.op("Add", [output, self._constant(values.reshape(1, 1, -1))])
        return self._tape.op("Squeeze", [output, self._constant(np.array([0]))]) if rank == 2 else output

    def _convolution(
        self, layer: Layer, codes: ir.Value, quantizer: IntegerQuantizer, less: int, bias: Sequence[ir.Value], node: ir.Node
    ) -> ir.Value:
        weight = self._checkpoint.weights[layer.name]
        scale = weight.scale.cpu().numpy().reshape(-1, *[1] * (weight.codes.dim() - 1)) * np.float32(quantizer.scale)
        x = self._tape.op("Cast", [codes], {"to": ir.DataType.FLOAT})
        x = self._tape.op("Sub", [x, self._constant(np.float32(quantizer.zero_point - less))])
        integers = self._tape.op("Cast", [self._integers(weight, transposed=False)], {"to": ir.DataType.FLOAT})
        attributes = {name: attribute for name, attribute in node.attributes.items() if name != "layer"}
        return self._tape.op("Conv", [x, self._tape.op("Mul", [integers, self._constant(scale)]), *bias], attributes, name=layer.name)

    def _integers(self, weight: QuantizedWeight, transposed: bool) -> ir.Value:
        """`codes - zero_point` as int8: an initializer, or the call that unpacks one."""
        bits, tensors = weight_tensors(weight, self._storage, transposed, self._opset)
        inputs = [self._constant(tensor) for tensor in tensors]
        if len(inputs) == 1:
            return inputs[0]
        function = unpack_function(bits, self._opset)
        self._model.functions.setdefault(function.identifier(), function)
        return self._tape.op(function_name(bits), inputs, domain=DOMAIN)

    def _constant(self, value: "np.generic | np.ndarray | ir.TensorProtocol") -> ir.Value:
        """An initializer, the same one for equal content."""
        tensor = value if isinstance(value, ir.TensorProtocol) else ir.tensor(np.asarray(value))
        key = (str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.tobytes())
        if key not in self._constants:
            name = f"vitq.constant.{len(self._constants)}"
            constant = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
            self._model.graph.register_initializer(constant)
            self._constants[key] = constant
        return self._constants[key]


def _code(code: int, less: int) -> np.uint8 | np.int8:
    return np.int8(code - less) if less > 0 else np.uint8(code - less)


def integer_quantizer(checkpoint: Checkpoint, operand: Operand) -> IntegerQuantizer:
    """The quantizer of an operand, of a kind that integer kernels read.

    Raises:
        UsageError: it is of another kind.
    """
    quantizer = checkpoint.activations[operand.tensor]
    if not isinstance(quantizer, INTEGER_QUANTIZERS):
        raise UsageError(
            f"the input {operand.tensor} is quantized by {type(quantizer).__name__}, which integer kernels do not read and export does "
            "not write; calibrate with a recipe that exports, such as `vitq calibrate --recipe fast --force`"
        )
    return quantizer


def _stays_below(quantizer: IntegerQuantizer, role: str) -> bool:
    """Whether codes cannot exceed 2^bits - 1 anyway: at 8 bits uint8 saturates; a softmax is at most 1."""
    highest = highest_code(quantizer.bits)
    bounded = role == "post_softmax" and np.rint(np.float32(1) / np.float32(quantizer.scale)) + quantizer.zero_point <= highest
    return quantizer.bits == 8 or bool(bounded)


def _saturates(quantizer: IntegerQuantizer, role: str) -> bool:
    """Whether codes can exceed 2^bits - 1 and none can be below 0, so that the upper end of uint8 does what a Clip would."""
    if not isinstance(quantizer, Uniform) or role not in _LOWEST or _stays_below(quantizer, role):
        return False
    return bool(np.rint(np.float32(_LOWEST[role]) / np.float32(quantizer.scale)) + quantizer.zero_point >= 0)


_LOWEST = {"post_gelu": -0.1701, "post_softmax": 0.0}
"""What values cannot fall below, by the role of an operand."""


def _shape(value: ir.Value) -> ir.Shape:
    assert value.shape is not None, f"torch.onnx left {value.name} without a shape"
    return value.shape


def _numpy(value: ir.Value) -> np.ndarray:
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None, f"the bias {value.name} is computed"
    return tensor.numpy()
