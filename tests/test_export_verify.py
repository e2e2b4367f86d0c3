"""Verification catches a planted fault, however small, names the layer, and leaves no file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_checkpoints import make_checkpoint, mixed, random_images, small_vit
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import vitq.onnx_file
from vitq.checkpoint import Checkpoint
from vitq.errors import VerificationError
from vitq.onnx_file import export
from vitq.onnx_file.finish import finish_file
from vitq.onnx_file.lowering import LoweredLayer, lower
from vitq.onnx_file.trace import trace_graph
from vitq.onnx_file.verify import verify_file

IMAGES = [random_images(4, (3, 32, 32))]
Exported = tuple[onnx.ModelProto, Sequence[LoweredLayer], Checkpoint]


@pytest.fixture(scope="module")
def exported() -> Exported:
    return exported_model(small_vit())


def exported_model(model: nn.Module) -> Exported:
    checkpoint = make_checkpoint(model, weight=mixed, activation=mixed)
    traced = trace_graph(checkpoint.graph)
    layers = lower(traced, checkpoint, "packed")
    return finish_file(traced, layers, checkpoint), layers, checkpoint


class File:
    """A copy of an exported file to damage."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)

    def node(self, layer: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if node.name == layer)

    def maker(self, value: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if value in node.output)

    def reader(self, value: str) -> onnx.NodeProto:
        return next(node for node in self.model.graph.node if value in node.input)

    def change(self, node: onnx.NodeProto, position: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Gives one node a changed copy of a constant, so that no other node sees the change."""
        value = next(tensor for tensor in self.model.graph.initializer if tensor.name == node.input[position])
        array = numpy_helper.to_array(value)
        changed = change(array.copy()).astype(array.dtype)
        assert changed.tobytes() != array.tobytes()
        name = f"changed.{len(self.model.graph.initializer)}"
        tensor = onnx.TensorProto()
        tensor.CopyFrom(value)
        tensor.CopyFrom(numpy_helper.from_array(changed, name))
        self.model.graph.initializer.append(tensor)
        node.input[position] = name


def first(amount: float, factor: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """Changes the first element alone."""

    def changed(array: np.ndarray) -> np.ndarray:
        flat = array.reshape(-1)
        flat[0] = flat[0].astype(np.float64) * factor + amount
        return array

    return changed


def flipped_bit(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] ^= 1
    return array


def activation(file: File, layer: str, operand: int = 0) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear of a layer's operand."""
    dequantize = file.maker(file.node(layer).input[operand])
    node = dequantize
    while node.op_type != "QuantizeLinear":
        node = file.maker(node.input[0])
    return node, dequantize


def weight_scale(file: File, layer: str) -> None:
    file.change(file.maker(file.node(layer).input[1]), 1, first(0, 1.001))


def one_code(file: File, layer: str) -> None:
    unpack = file.maker(file.maker(file.node(layer).input[1]).input[0])
    file.change(unpack, 0, flipped_bit)


def weight_zero_point(file: File, layer: str) -> None:
    unpack = file.maker(file.maker(file.node(layer).input[1]).input[0])
    file.change(unpack, [i for i, _ in enumerate(unpack.input)][-2], flipped_bit)


def bias(file: File, layer: str) -> None:
    file.change(file.reader(file.node(layer).output[0]), 1, first(1e-2))


def activation_scale(file: File, layer: str) -> None:
    for node in activation(file, layer):
        file.change(node, 1, lambda scale: scale * np.float32(1.01))


def dequantizing_scale(file: File, layer: str) -> None:
    file.change(activation(file, layer)[1], 1, lambda scale: scale * np.float32(1.001))


def activation_zero_point(file: File, layer: str) -> None:
    for node in activation(file, layer):
        file.change(node, 2, flipped_bit)


def clip(file: File, layer: str) -> None:
    node = file.maker(activation(file, layer)[1].input[0])
    assert node.op_type == "Clip"
    file.change(node, 2, lambda highest: highest - 1)


def normalisation_before(file: File, layer: str) -> None:
    norm = file.maker(activation(file, layer)[0].input[0])
    assert norm.op_type == "LayerNormalization"
    file.change(norm, 1, first(0, 1.05))


@pytest.mark.parametrize(
    "plant",
    [
        weight_scale, one_code, weight_zero_point, bias, activation_scale, dequantizing_scale, activation_zero_point, clip,
        normalisation_before,
    ],
)  # fmt: skip
def test_a_planted_fault_is_caught_and_the_layer_named(exported: Exported, plant: Callable[[File, str], None]) -> None:
    model, layers, checkpoint = exported
    layer = "blocks.1.mlp.fc1"
    assert 2 <= checkpoint.weights[layer].bits < 8
    file = File(model)
    plant(file, layer)
    with pytest.raises(VerificationError, match=rf"^layer {layer}: given the same (input|codes), .*No file was written"):
        verify_file(file.model, layers, checkpoint, IMAGES)


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("layer", ["blocks.0.attn.qk", "blocks.1.attn.av"])
def test_a_fault_at_either_operand_of_a_matmul_is_caught(exported: Exported, layer: str, operand: int) -> None:
    model, layers, checkpoint = exported
    file = File(model)
    for node in activation(file, layer, operand):
        file.change(node, 1, lambda scale: scale * np.float32(1.02))
    with pytest.raises(VerificationError, match=f"^layer {layer}: "):
        verify_file(file.model, layers, checkpoint, IMAGES)


def test_a_fault_behind_the_last_layer_is_caught() -> None:
    class Rescaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = small_vit()
            self.factor = nn.Parameter(torch.rand(10))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.vit(images) * self.factor

    model, layers, checkpoint = exported_model(Rescaled())
    assert verify_file(model, layers, checkpoint, IMAGES).top1 >= 0
    file = File(model)
    file.change(file.maker("output"), 1, lambda factor: factor * np.float32(1.001))
    with pytest.raises(VerificationError, match="^the ops behind the last layer: given the same layer outputs, the output differs by"):
        verify_file(file.model, layers, checkpoint, IMAGES)


def test_what_another_reader_makes_of_a_small_file_is_compared_too(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, checkpoint = exported
    layer = next(layer for layer in layers if layer.layer.name == "blocks.1.mlp.fc1")

    class Misreader(ReferenceEvaluator):
        def run(self, names: Sequence[str] | None, feed: dict[str, np.ndarray], **others: object) -> list[np.ndarray]:  # type: ignore[override]
            found = super().run(names, feed, **others)  # type: ignore[arg-type]
            return [
                value + 1 if name == f"-{layer.output.name}" else value
                for name, value in zip(names or [""] * len(found), found, strict=True)
            ]

    verify_file(model, layers, checkpoint, IMAGES)
    monkeypatch.setattr("vitq.onnx_file.verify.ReferenceEvaluator", Misreader)
    with pytest.raises(VerificationError, match=r"^layer blocks.1.mlp.fc1: given the same codes, its output differs by 1"):
        verify_file(model, layers, checkpoint, IMAGES)
    monkeypatch.setattr("vitq.onnx_file.verify.SMALL", 0)
    verify_file(model, layers, checkpoint, IMAGES)


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_that_does_not_verify_is_not_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exists: bool) -> None:
    def damaged(*arguments: object) -> onnx.ModelProto:
        file = File(finish_file(*arguments))  # type: ignore[arg-type]
        one_code(file, "blocks.0.attn.proj")
        return file.model

    monkeypatch.setattr(vitq.onnx_file, "finish_file", damaged)
    checkpoint, path = make_checkpoint(small_vit(), weight=3, activation=3), tmp_path / "model.onnx"
    if exists:
        path.write_text("the one before")
    with pytest.raises(VerificationError, match="^layer blocks.0.attn.proj: given the same codes"):
        export(checkpoint, path, IMAGES, force=True)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["the one before"] * exists
