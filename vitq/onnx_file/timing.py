"""Files to be timed before anything is calibrated: the whole model at one activation width, and each of its layers alone.

They are lowered and finished by the code that writes real files, so they have the same ops; only their numbers are made up, and time does
not depend on those. Weights are at 8 bits: however they are stored, onnxruntime unfolds them to int8 when it makes a session, so that
their width is gone before the first run. An activation below 8 bits costs a Clip, a softmax its rows of squares, a GELU its two step
sizes, which it mostly has. A linear that is written in parts is timed whole: what the parts take more or less is in what the model takes
beside its layers.

Leaves out: verification, and anything about accuracy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch

from vitq.affine import QuantizedWeight, highest_code, weight_codes
from vitq.artifacts import BitPlan, Bits, Layer, LayerBits, ModelSpec
from vitq.checkpoint import Checkpoint
from vitq.graph import Graph
from vitq.onnx_file.factors import fold_numbers
from vitq.onnx_file.finish import finish_file
from vitq.onnx_file.lowering import lower
from vitq.onnx_file.split import split_linears
from vitq.onnx_file.storage import Storage
from vitq.onnx_file.trace import DOMAIN, OPSET, trace_graph
from vitq.quantizers import Quantizer, RowSquares, TwinGrid, Uniform
from vitq.runtime import INT8_ALLOWED

_IR_VERSION = 10  # of OPSET


@dataclass(frozen=True)
class LayerFile:
    """One layer as a file of its own, and the names of all layers that are like it.

    `shapes` are those of its inputs for one image; their first axis grows with the batch.
    """

    layers: tuple[str, ...]
    content: bytes
    shapes: tuple[tuple[int, ...], ...]


def timing_files(graph: Graph, spec: ModelSpec, widths: Iterable[Bits]) -> dict[Bits, tuple[bytes, list[LayerFile]]]:
    """By width: the whole model, 8-bit weights and activations of the width, and a file for each kind of layer (equal ops and shapes).

    Args:
        graph: the graph as it is exported, LayerNorms folded.
        spec: its model.
        widths: of the activations of every layer; the kinds are the same, in the same order, at all of them.

    Raises:
        InputError: torch.onnx cannot express some op of the graph.
    """
    layers = {layer.name: layer for layer in graph.layers}
    kinds: dict[Any, list[tuple[Layer, ir.Node]]] = {}
    for node in trace_graph(graph).graph:
        if node.domain == DOMAIN:
            layer = layers[node.attributes["layer"].as_string()]
            kinds.setdefault(_kind(layer, node), []).append((layer, node))
    found: dict[Bits, tuple[bytes, list[LayerFile]]] = {}
    for bits in widths:
        checkpoint = made_up(graph, spec, bits)
        files = [
            LayerFile(
                tuple(layer.name for layer, _ in alike),
                _finished(_alone(*alike[0]), checkpoint),
                tuple(operand.shape for operand in alike[0][0].activations),
            )
            for alike in kinds.values()
        ]
        found[bits] = whole_file(checkpoint), files
    return found


def whole_file(checkpoint: Checkpoint, storage: Storage = "fast", attention_int8: bool = False) -> bytes:
    """The file of a checkpoint as `export` makes it (opset 21, dynamic batch), but unverified."""
    written = fold_numbers(split_linears(checkpoint)[0])
    return _finished(trace_graph(written.graph), written, storage, attention_int8)


def nothing() -> bytes:
    """A file that hands one number through: what a run costs beside its ops."""
    given, returned = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "nothing", [given], [returned])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
    return model.SerializeToString()


def made_up(graph: Graph, spec: ModelSpec, activation_bits: Bits | Mapping[str, Bits], weight_bits: Bits = 8) -> Checkpoint:
    """A checkpoint whose weights are noise and whose activations span [-4, 4], or most of what a softmax gives.

    `activation_bits` is one width for all layers or one for each by name; where readers of one tensor differ, the last one's holds.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in graph.layers:
        if layer.has_weight:
            lowest, highest = weight_codes(weight_bits)
            codes = torch.randint(lowest, highest + 1, layer.operands[1].shape, generator=generator).to(torch.uint8)
            scale = torch.full((layer.channels,), 2 / ((highest - lowest) * (layer.parameters / layer.channels) ** 0.5))
            zero_point = torch.full((layer.channels,), 2 ** (weight_bits - 1), dtype=torch.uint8)
            weights[layer.name] = QuantizedWeight(codes, scale, zero_point, weight_bits)
    bits: dict[str, Bits] = {
        layer.name: activation_bits[layer.name] if isinstance(activation_bits, Mapping) else activation_bits for layer in graph.layers
    }
    activations = {operand.tensor: _quantizer(operand.role, bits[layer.name]) for layer in graph.layers for operand in layer.activations}
    entries = [
        LayerBits(name=layer.name, type=layer.type, weight_bits=weight_bits if layer.has_weight else None, activation_bits=bits[layer.name])
        for layer in graph.layers
    ]
    return Checkpoint(graph, BitPlan(model=spec, layers=tuple(entries)), weights, activations)


def _quantizer(role: str, bits: Bits) -> Quantizer:
    plain, softmax = (float(torch.tensor(value)) for value in (8.0 / highest_code(bits), 0.9 / 255))
    if role == "post_softmax":
        return RowSquares(bits) if bits < 8 else Uniform(softmax, 0, bits)
    if role == "post_gelu" and bits < 8:
        return TwinGrid(plain / 4, 0, highest_code(bits) // 2 + 1, 3, bits)
    return Uniform(plain, 2 ** (bits - 1), bits)


def _kind(layer: Layer, node: ir.Node) -> Any:
    """What equal layers have in common: op, shapes, settings of a convolution, a bias or none."""
    settings = {name: str(attribute.value) for name, attribute in node.attributes.items() if name != "layer"}
    return layer.op, tuple(operand.shape for operand in layer.operands), tuple(sorted(settings.items())), len(node.inputs)


def _alone(layer: Layer, node: ir.Node) -> ir.Model:
    """A model of one node that is still to be lowered; its bias is zero."""
    inputs = [
        ir.Value(name=f"x{at}", shape=ir.Shape(["batch", *operand.shape[1:]]), type=ir.TensorType(ir.DataType.FLOAT))
        for at, operand in enumerate(layer.activations)
    ]
    biases = []
    if any(value is not None for value in node.inputs[len(inputs) :]):
        zeros = ir.tensor(torch.zeros(layer.channels).numpy())
        biases = [ir.Value(name="bias", shape=ir.Shape([layer.channels]), type=ir.TensorType(ir.DataType.FLOAT), const_value=zeros)]
    rank = len(node.outputs[0].shape or ())
    output = ir.Value(name="y", shape=ir.Shape([None] * rank), type=ir.TensorType(ir.DataType.FLOAT))
    copied = ir.Node(DOMAIN, node.op_type, [*inputs, *biases], node.attributes.values(), outputs=[output])
    graph = ir.Graph(inputs, [output], nodes=[copied], initializers=biases, opset_imports={"": OPSET, DOMAIN: 1})
    return ir.Model(graph, ir_version=_IR_VERSION)


def _finished(model: ir.Model, checkpoint: Checkpoint, storage: Storage = "fast", attention_int8: bool = False) -> bytes:
    layers = lower(model, checkpoint, storage, attention_int8)
    return finish_file(model, layers, checkpoint, INT8_ALLOWED if attention_int8 else {}).SerializeToString()
