"""The exported file: integer kernels for linears and matmuls of any shape, the fake-quantized values, what it says of itself."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from export_checkpoints import make_checkpoint, mixed, random_images, small_vit
from torch import Tensor, nn

import vitq.onnx_file.file
from vitq.accuracy import onnx_runnable
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError, UsageError
from vitq.onnx_file import ExportReport, export
from vitq.onnx_file.digests import check_digests
from vitq.onnx_file.kernels import optimised_graph
from vitq.processor import processor
from vitq.quantizers import TwinGrid, Uniform
from vitq.runtime import needed_options, open_session


class Shapes(nn.Module):
    """What transformers do to layers: inputs of 2 to 5 axes, windows in the batch, shared inputs, no bias, a transposed operand, a Relu."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, (3, 4), padding="same", groups=16, bias=False)
        self.five, self.four = nn.Linear(16, 16), nn.Linear(16, 16)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 24)
        self.proj, self.fc1, self.fc2 = nn.Linear(24, 16), nn.Linear(16, 32, bias=False), nn.Linear(32, 16)
        self.position = nn.Parameter(torch.randn(16, 16))
        self.gate, self.head = nn.Linear(16, 16), nn.Linear(16, 7, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(self.depthwise(self.stem(images))).permute(0, 2, 3, 1)  # (B, 16, 16, 16)
        x = x + self.five(x.reshape(-1, 4, 4, 16, 16)).reshape(-1, 16, 16, 16)
        windows = x.reshape(-1, 4, 4, 4, 4, 16).transpose(2, 3).reshape(-1, 16, 16)  # (16 B, 16, 16)
        attention = (self.q(windows) @ self.k(windows).transpose(-2, -1) + torch.tanh(self.position)).softmax(-1)
        x = self.four(x) + self.proj(attention @ self.v(windows)).reshape(-1, 16, 16, 16)
        x = x + self.fc2(F.relu(self.fc1(x)))
        pooled = x.mean((1, 2))  # (B, 16)
        return self.head(pooled * torch.sigmoid(self.gate(pooled)))


def run(path: Path, images: Tensor) -> np.ndarray:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})[0]


@pytest.fixture(scope="module")
def vit() -> Checkpoint:
    return make_checkpoint(small_vit(), weight=mixed, activation=mixed)


@pytest.fixture(scope="module")
def exported(vit: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportReport]:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return path, export(vit, path, [random_images(3, (3, 32, 32), seed) for seed in range(2)])


def test_every_linear_and_matmul_of_a_vit_becomes_an_integer_kernel(vit: Checkpoint, exported: tuple[Path, ExportReport]) -> None:
    path, report = exported
    assert len({entry.activation_bits for entry in vit.plan.layers}) > 3
    assert report.not_fused == ()
    assert (report.integer_candidates, report.integer_kernels, report.quantized_layers, report.float_by_choice) == (14, 14, 14, 0)
    assert report.code_mismatch <= 1e-4
    assert report.file_bytes == path.stat().st_size
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    planned = sum(weight.bits * weight.codes.numel() for weight in vit.weights.values()) / 8
    assert report.planned_weight_bytes == planned
    assert planned < report.weight_bytes <= planned + 5 * sum(len(weight.scale) for weight in vit.weights.values())


def test_storage_fast_gives_the_same_kernels_and_values(vit: Checkpoint, exported: tuple[Path, ExportReport], tmp_path: Path) -> None:
    path, images = tmp_path / "model.onnx", random_images(4, (3, 32, 32))
    report = export(vit, path, [images], "fast")
    assert report.not_fused == ()
    assert report.weight_bytes > exported[1].weight_bytes
    assert np.array_equal(run(path, images), run(exported[0], images))


def test_storage_standard_is_plain_and_refuses_weights_with_zero_points(vit: Checkpoint, tmp_path: Path) -> None:
    path, images = tmp_path / "model.onnx", random_images(4, (3, 32, 32))
    with pytest.raises(UsageError, match="have some \\(.*\\); run `vitq calibrate --symmetric --force`, or give --storage packed"):
        export(vit, path, [images], "standard")
    checkpoint = make_checkpoint(small_vit(), weight=mixed, activation=8, symmetric=True)
    report = export(checkpoint, path, [images], "standard")
    model = onnx.load(path)
    assert not model.functions and {node.domain for node in model.graph.node} == {""}
    narrow = {name for name, weight in checkpoint.weights.items() if weight.bits <= 4}
    assert narrow and set(report.not_fused) == narrow  # onnxruntime has no kernel for int4
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    inputs = {node.output[0]: node.input for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.name in checkpoint.weights:
            wanted = onnx.TensorProto.INT4 if node.name in narrow else onnx.TensorProto.INT8
            assert types[inputs[node.input[1]][0]] == wanted
    with_int2 = tmp_path / "int2.onnx"
    assert export(checkpoint, with_int2, [images], "standard", opset=25).weight_bytes < report.weight_bytes
    of_two_bits = {name for name, weight in checkpoint.weights.items() if weight.bits == 2}
    types = [tensor.data_type for tensor in onnx.load(with_int2).graph.initializer]
    assert types.count(onnx.TensorProto.INT2) == len(of_two_bits) > 0
    np.testing.assert_allclose(run(with_int2, images), run(path, images), rtol=1e-5, atol=1e-5)
    export(checkpoint, tmp_path / "packed.onnx", [images], "packed")
    np.testing.assert_allclose(run(path, images), run(tmp_path / "packed.onnx", images), rtol=0, atol=0.1)


@pytest.mark.parametrize("bits", [8, 5, 2])
def test_layers_of_every_shape_are_exported_and_agree(bits: int, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(Shapes(), weight=bits, activation=bits)
    path = tmp_path / "model.onnx"
    report = export(checkpoint, path, [random_images(5, (3, 32, 32))])
    assert report.not_fused == ()
    assert (report.integer_candidates, report.float_by_choice) == (12, 2)
    assert [run(path, random_images(batch, (3, 32, 32))).shape for batch in (1, 2, 5)] == [(1, 7), (2, 7), (5, 7)]


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_layer_computes_its_formula(bits: int, tmp_path: Path) -> None:
    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(32, 24)

        def forward(self, images: Tensor) -> Tensor:
            return self.only(images)

    checkpoint = make_checkpoint(OneLayer(), weight=bits, activation=bits)
    path, images = tmp_path / "model.onnx", random_images(2, (3, 32, 32), seed=9)
    export(checkpoint, path, [images])
    (qparams,), weight = checkpoint.activations.values(), checkpoint.weights["only"]
    codes = np.clip(np.rint(images.numpy() / np.float32(qparams.scale)) + qparams.zero_point, 0, 2**bits - 1) - qparams.zero_point
    integers = weight.codes.numpy().astype(float) - weight.zero_point.numpy()[:, None]
    expected = (codes @ integers.T) * qparams.scale * weight.scale.numpy() + checkpoint.graph.module.state_dict()["only.bias"].numpy()
    np.testing.assert_allclose(run(path, images), expected, rtol=1e-5, atol=1e-5)


def test_the_file_runs_without_any_optimisation_too(vit: Checkpoint, exported: tuple[Path, ExportReport]) -> None:
    path, images = exported[0], random_images(4, (3, 32, 32))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    (found,) = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
    expected, unquantized = vit.quantized_module()(images).numpy(), vit.graph.module(images).numpy()
    assert np.square(found - expected).mean() < np.square(expected - unquantized).mean()


def test_the_file_says_what_it_is(vit: Checkpoint, exported: tuple[Path, ExportReport]) -> None:
    model = onnx.load(exported[0])
    facts = {entry.key.removeprefix("vitq."): json.loads(entry.value) for entry in model.metadata_props}
    assert facts["format"] == "vitq-onnx/1"
    assert facts["preprocessing"] == vit.plan.model.data_config
    assert facts["num_classes"] == 10
    assert facts["label_names"] == ["première", "b"]
    assert facts["plan"] == {entry.name: [entry.weight_bits, entry.activation_bits] for entry in vit.plan.layers}
    assert set(facts["versions"]) == {"vitq", "torch", "timm", "onnx", "onnxruntime"}
    assert len(facts["digest"]) == 64
    assert facts["verified_with"] == {
        "onnxruntime": onnxruntime.__version__,
        "provider": "CPUExecutionProvider",
        "session_options": {"graph_optimization_level": "ORT_ENABLE_ALL", "session.intra_op.allow_spinning": "0"},
        "processor": json.loads(json.dumps(asdict(processor()))),
    }
    assert (model.ir_version, model.opset_import[0].version, len(model.graph.value_info)) == (10, 21, 0)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["images", "output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    parts = {f"blocks.{block}.attn.qkv": {f"blocks.{block}.attn.qkv.{part}" for part in range(3)} for block in (0, 1)}
    named = set().union(*(parts.get(layer.name, {layer.name}) for layer in vit.graph.layers))
    assert {node.name for node in model.graph.node} - {""} == named


def test_an_existing_file_an_unknown_storage_and_no_images_are_refused(
    vit: Checkpoint, exported: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="storage 'zip' is not known; give one of packed, standard, fast"):
        export(vit, path, [random_images(2, (3, 32, 32))], "zip")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no images to verify the file on; give some with --images"):
        export(vit, path, [])
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already; give --force"):
        export(vit, path, [random_images(2, (3, 32, 32))])
    assert path.read_text() == "mine"
    export(vit, path, [random_images(2, (3, 32, 32))], force=True)
    assert path.read_bytes() == exported[0].read_bytes()  # the same checkpoint gives the same bytes


@pytest.mark.parametrize("width", [8, 4])
def test_keys_and_values_as_int8_compute_the_same(width: int, tmp_path: Path) -> None:
    checkpoint, images = make_checkpoint(small_vit(), weight=width, activation=width), random_images(4, (3, 32, 32))
    plain, signed = tmp_path / "plain.onnx", tmp_path / "signed.onnx"
    export(checkpoint, plain, [images])
    report = export(checkpoint, signed, [images], attention_int8=True)
    assert report.not_fused == () and report.code_mismatch == 0
    expected = run(plain, images)
    np.testing.assert_allclose(run(signed, images), expected, rtol=1e-5, atol=1e-5)  # in a session that does not know of it
    np.testing.assert_allclose(onnx_runnable(signed)(images), expected, rtol=1e-5, atol=1e-5)
    model, allowed = onnx.load(signed), {"session.qdqisint8allowed": "1"}
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata["vitq.session_options"] == allowed and allowed.items() <= metadata["vitq.verified_with"]["session_options"].items()
    assert needed_options(open_session(signed)) == allowed and needed_options(open_session(plain)) == {}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.name.endswith((".qk", ".av")):
            kinds = [types[makers[name].input[2]] for name in node.input]
            assert kinds == [onnx.TensorProto.UINT8, onnx.TensorProto.INT8]
    assert sum(kind == "MatMulIntegerToFloat" for kind in (node.op_type for node in optimised_graph(signed).node)) >= 4


def test_a_file_names_no_session_options_but_those_that_vitq_knows(
    vit: Checkpoint, exported: tuple[Path, ExportReport], tmp_path: Path
) -> None:
    model = onnx.load(exported[0])
    for value in ('{"session.use_env_allocators": "1"}', "[1]", "no JSON"):
        onnx.helper.set_model_props(model, {"vitq.session_options": value})
        onnx.save(model, tmp_path / "model.onnx")
        assert needed_options(open_session(tmp_path / "model.onnx")) == {}


@pytest.mark.parametrize(("opset", "ir_version"), [(22, 10), (23, 11), (25, 13)])
def test_later_opsets_compute_the_same(
    vit: Checkpoint, exported: tuple[Path, ExportReport], opset: int, ir_version: int, tmp_path: Path
) -> None:
    path, images = tmp_path / "model.onnx", random_images(4, (3, 32, 32))
    assert export(vit, path, [images], opset=opset).not_fused == ()
    model = onnx.load(path)
    assert (model.opset_import[0].version, model.ir_version) == (opset, ir_version)
    np.testing.assert_allclose(run(path, images), run(exported[0], images), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="opset 20 is not written; give one from 21 to 25"):
        export(vit, tmp_path / "other.onnx", [images], opset=20)


def test_a_fixed_batch(vit: Checkpoint, exported: tuple[Path, ExportReport], tmp_path: Path) -> None:
    path, images = tmp_path / "model.onnx", random_images(7, (3, 32, 32))
    stages: list[tuple[float, float, str]] = []
    report = export(vit, path, list(images.split(2)), batch=3, progress=lambda *stage: stages.append(stage))
    assert [(begun, whole) for begun, whole, _ in stages] == [(at, 5) for at in range(1, 6)]
    assert stages[1][2] == "2 of 5, lower"
    assert report.not_fused == ()
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    expected = run(exported[0], images)
    np.testing.assert_allclose(run(path, images[:3]), expected[:3], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(onnx_runnable(path)(images), expected, rtol=1e-5, atol=1e-5)
    export(vit, path, [images[:1]], batch=4, force=True)  # fewer images than it takes
    with pytest.raises(UsageError, match="a batch of 0 images"):
        export(vit, path, [images], batch=0, force=True)


def test_a_large_model_is_two_files(
    vit: Checkpoint, exported: tuple[Path, ExportReport], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vitq.onnx_file.file, "LARGEST", 10_000)
    path, images = tmp_path / "model.onnx", random_images(4, (3, 32, 32))
    report = export(vit, path, [images])
    parts = [path, tmp_path / "model.onnx.data"]
    assert sorted(tmp_path.iterdir()) == sorted(parts)
    assert report.file_bytes == sum(part.stat().st_size for part in parts) and path.stat().st_size < report.file_bytes / 2
    assert np.array_equal(run(path, images), run(exported[0], images))
    assert check_digests(path) == check_digests(exported[0])
    with parts[1].open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match="is not the file that was exported"):
        check_digests(path)
    monkeypatch.undo()
    export(vit, path, [images], force=True)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("zero_point", "clips"), [(2, False), (0, True)])
def test_what_is_bounded_below_needs_no_clip(zero_point: int, clips: bool, tmp_path: Path) -> None:
    """The least output of a GELU, -0.17, has code 0 or more at zero point 2, and is cut off at 0."""
    checkpoint = make_checkpoint(small_vit(), weight=8, activation=4)
    tensors = {layer.operands[0].tensor for layer in checkpoint.graph.layers if layer.operands[0].role == "post_gelu"}
    assert tensors
    activations = {
        tensor: Uniform(0.125, zero_point, 4) if tensor in tensors else given for tensor, given in checkpoint.activations.items()
    }
    checkpoint = replace(checkpoint, activations=activations)
    path, images = tmp_path / "model.onnx", random_images(4, (3, 32, 32))
    assert export(checkpoint, path, [images]).code_mismatch == 0
    model = onnx.load(path)
    readers = {name: node for node in model.graph.node for name in node.input}
    for gelu in (node for node in model.graph.node if node.op_type == "Gelu"):
        assert (readers[readers[gelu.output[0]].output[0]].op_type == "Clip") == clips
    np.testing.assert_allclose(run(path, 3 * images), checkpoint.quantized_module()(3 * images).detach(), rtol=0, atol=0.05)


@pytest.mark.parametrize("parameters", [(0.05, 3, 8, 5, 4), (0.1, 0, 2, 9, 2), (0.02, 5, 31, 3, 6), (0.3, 1, 1, 3, 3)])
def test_two_step_sizes_run_as_tables_and_give_the_quantizers_integers(parameters: tuple, tmp_path: Path) -> None:
    """Every number from far below the lowest code to far above the highest, but for those at a tie, through onnxruntime."""
    quantizer = TwinGrid(float(np.float32(parameters[0])), *parameters[1:])
    checkpoint = make_checkpoint(small_vit(), weight=8, activation=quantizer.bits)
    tensors = {layer.operands[0].tensor for layer in checkpoint.graph.layers if layer.operands[0].role == "post_gelu"}
    checkpoint = replace(checkpoint, activations=dict(checkpoint.activations) | dict.fromkeys(tensors, quantizer))
    path, images = tmp_path / "model.onnx", random_images(4, (3, 32, 32))
    report = export(checkpoint, path, [images])
    assert report.not_fused == () and report.code_mismatch == 0
    kernels = [node.op_type for node in optimised_graph(path).node]
    assert kernels.count("QLinearLeakyRelu") == 2 * len(tensors) == 4 and "LeakyRelu" not in kernels

    model = onnx.load(path)
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    at = list(model.graph.node).index(gelu)
    chain = list(model.graph.node)[at + 1 : at + 8]
    assert [node.op_type for node in chain] == ["QuantizeLinear", "DequantizeLinear", "LeakyRelu"] * 2 + ["QuantizeLinear"]
    used = {name for node in chain for name in node.input}
    graph = onnx.helper.make_graph(
        chain,
        "chain",
        [onnx.helper.make_tensor_value_info(gelu.output[0], onnx.TensorProto.FLOAT, ["n"])],
        [onnx.helper.make_tensor_value_info(chain[-1].output[0], onnx.TensorProto.UINT8, ["n"])],
        [tensor for tensor in model.graph.initializer if tensor.name in used],
    )
    steps = torch.arange(-1500, 30_000) / 100
    steps = steps[((steps % 1) - 0.5).abs() > 1e-3]
    session = onnxruntime.InferenceSession(
        onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=10).SerializeToString()
    )
    (found,) = session.run(None, {gelu.output[0]: (steps * quantizer.scale).numpy()})
    codes = range(2**quantizer.bits)
    levels = [code - quantizer.zero_point + (quantizer.ratio - 1) * max(code - quantizer.knee, 0) for code in codes]
    nearest = [min(levels, key=lambda level: abs(level - step)) + quantizer.zero_point for step in steps.tolist()]
    assert found.tolist() == nearest
