"""Recipe `fast` and the checkpoint file: what calibration promises on its images, and that a file gives back exactly what was saved."""

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import FAMILIES, captured, images, timm_model
from torch import Tensor

from vitq import checkpoint as checkpoints
from vitq.affine import quantize_dequantize
from vitq.artifacts import BitPlan, LayerBits, ModelSpec
from vitq.calibration.fast import calibrate_fast
from vitq.checkpoint import Checkpoint, is_checkpoint
from vitq.errors import InputError, UsageError
from vitq.fakequant import fake_quantize
from vitq.graph import Graph, capture, run, values_at
from vitq.ranges import fold
from vitq.rewrites import rewrite


def plan_for(graph: Graph, family: str, bits: int | Callable[[int], int] = 4, num_classes: int = 10) -> BitPlan:
    """A plan whose layers have `bits`, or what the function makes of a layer's number; readers of one tensor get the same."""
    chosen: dict[str, int] = {}
    entries = []
    for index, layer in enumerate(graph.layers):
        width = bits if isinstance(bits, int) else bits(index)
        tensors = [operand.tensor for operand in layer.activations]
        width = next((chosen[tensor] for tensor in tensors if tensor in chosen), width)
        chosen |= dict.fromkeys(tensors, width)
        entries.append(LayerBits(name=layer.name, type=layer.type, weight_bits=width if layer.has_weight else None, activation_bits=width))
    name, size, arguments = FAMILIES[family]
    spec = ModelSpec(
        architecture=name,
        arguments=json.loads(json.dumps(arguments)),
        num_classes=num_classes,
        data_config={"input_size": [3, size, size]},
        graph_digest=graph.digest,
    )
    return BitPlan(model=spec, layers=tuple(entries), made_from={"seed": 0})


def in_batches(x: Tensor, size: int) -> list[tuple[Tensor, None]]:
    return [(part, None) for part in x.split(size)]


@pytest.fixture(scope="module")
def vit() -> Checkpoint:
    """A vit with every width from 2 to 8 somewhere."""
    graph = rewrite(captured("vit")[1])
    return calibrate_fast(graph, plan_for(graph, "vit", lambda index: 2 + index % 7), in_batches(images(12, 32), 6))


@pytest.fixture(scope="module")
def saved(vit: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    checkpoints.save(vit, path)
    return path


# What calibration does


def test_with_all_quantizers_off_the_logits_do_not_move():
    model, captured_graph = captured("vit")
    folded, _ = fold(rewrite(captured_graph), in_batches(images(8, 32), 4))
    x = images(5, 32, seed=9)
    off = fake_quantize(folded, {})
    with torch.no_grad():
        assert torch.allclose(off(x), model(x), atol=2e-5, rtol=1e-4)
        assert not any(node.target is quantize_dequantize for node in off.graph.nodes)


def test_eight_bits_are_near_the_float_model_and_two_are_not():
    model, captured_graph = captured("vit")
    graph = rewrite(captured_graph)
    batches = in_batches(images(16, 32), 8)
    x = images(8, 32, seed=9)
    errors = {}
    for bits in (2, 4, 8):
        module = calibrate_fast(graph, plan_for(graph, "vit", bits), batches).quantized_module()
        with torch.no_grad():
            errors[bits] = float((module(x) - model(x)).norm() / model(x).norm())
    assert errors[8] < 0.1 < errors[4] < errors[2]


@pytest.mark.parametrize(("family", "bits"), [("vit", 3), ("vit", 6), ("levit", 4)])
def test_every_channel_has_the_float_networks_mean_and_spread(family: str, bits: int):
    """On one batch of calibration images, in the quantized network itself: no layer's mean output error is left."""
    graph = rewrite(captured(family)[1])
    x = images(12, graph.input_shape[1:], seed=1)
    folded, _ = fold(graph, [(x, None)])
    checkpoint = calibrate_fast(graph, plan_for(graph, family, bits), [(x, None)])
    names = {layer.name: folded.nodes[layer.name] for layer in folded.layers if layer.has_weight}
    with torch.no_grad():
        wanted = values_at(folded.module, x, names.values())
        found = values_at(checkpoint.quantized_module(), x, names.values())
    spreads = 0
    for layer in folded.layers:
        if not layer.has_weight:
            continue
        node = names[layer.name]
        axis = -1 if layer.op == "linear" else 1
        a, b = (value[node].movedim(axis, -1).reshape(-1, layer.channels).double() for value in (wanted, found))
        assert torch.allclose(a.mean(0), b.mean(0), atol=5e-3 * float(a.std()), rtol=0), layer.name
        spreads += int(((b.std(0) / a.std(0) - 1).abs() < 1e-2).sum())
    # A gain lies between a half and two; all but the few channels that would need more have their spread.
    assert spreads > 0.97 * sum(layer.channels for layer in folded.layers)


def test_the_plan_is_followed(vit: Checkpoint):
    for layer in vit.graph.layers:
        bits = vit.plan.bits[layer.name]
        assert all(vit.activations[operand.tensor].bits == bits.activation_bits for operand in layer.activations)
        if layer.has_weight:
            weight = vit.weights[layer.name]
            assert weight.bits == bits.weight_bits
            own = vit.graph.module.get_parameter(layer.operands[1].tensor)
            assert torch.equal(own, weight.dequantize()) and own.shape == layer.operands[1].shape
            assert all(len(row.unique()) <= 2**weight.bits for row in own.flatten(1))


def test_every_layer_reads_at_most_two_to_the_bits_values(vit: Checkpoint):
    x = images(6, 32, seed=5)
    module = vit.quantized_module()
    with torch.no_grad():
        for layer in vit.graph.layers:
            node = next(node for node in module.graph.nodes if node.name == vit.graph.nodes[layer.name])
            for source, operand in zip(node.args, layer.activations, strict=False):
                assert source.op == "call_module" and str(source.target).startswith("quantizer_")
                values = values_at(module, x, [source.name])[source.name]
                parts = values.flatten(0, -2) if operand.role == "post_softmax" else [values]  # whose rows have units of their own
                assert all(1 < len(part.unique()) <= 2 ** vit.plan.bits[layer.name].activation_bits for part in parts), layer.name


def test_readers_of_one_value_share_one_quantizer():
    graph = rewrite(captured("cait")[1])
    checkpoint = calibrate_fast(graph, plan_for(graph, "cait", 5), in_batches(images(4, 32), 4))
    module = checkpoint.quantized_module()
    nodes = {node.name: node for node in module.graph.nodes}
    key, value = (nodes[checkpoint.graph.nodes[f"blocks_token_only.0.attn.{part}"]] for part in "kv")
    assert key.args[0] is value.args[0]
    quantizers = [node for node in module.graph.nodes if node.op == "call_module"]
    reads = sum(len(layer.activations) for layer in checkpoint.graph.layers)
    assert len(quantizers) == reads - 2  # k and v, in two blocks


def test_calibration_leaves_the_graph_that_it_was_given():
    graph = rewrite(captured("vit")[1])
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    calibrate_fast(graph, plan_for(graph, "vit", 2), in_batches(images(4, 32), 4))
    assert all(torch.equal(before[name], tensor) for name, tensor in graph.module.state_dict().items())


def test_a_plan_for_other_layers_is_refused():
    graph = rewrite(captured("vit")[1])
    plan = plan_for(graph, "vit")
    with pytest.raises(InputError, match="has no entry for layer 'head'"):
        calibrate_fast(graph, plan.model_copy(update={"layers": plan.layers[:-1]}), in_batches(images(4, 32), 4))


# The file


@pytest.mark.parametrize("family", ["vit", "swin", "levit"])
def test_a_loaded_checkpoint_computes_bit_for_bit_the_same(family: str, tmp_path: Path):
    graph = rewrite(captured(family)[1])
    plan = plan_for(graph, family, lambda index: (3, 8, 5)[index % 3])
    checkpoint = calibrate_fast(graph, plan, in_batches(images(4, graph.input_shape[1:]), 4))
    path = tmp_path / "model.safetensors"
    checkpoints.save(checkpoint, path)
    torch.manual_seed(12345)  # the architecture is built with other random weights
    loaded = checkpoints.load(path)
    x = images(3, graph.input_shape[1:], seed=8)
    with torch.no_grad():
        assert torch.equal(loaded.quantized_module()(x), checkpoint.quantized_module()(x))
        assert torch.equal(run(loaded.graph.module, x), run(checkpoint.graph.module, x))
    assert loaded.plan == checkpoint.plan and loaded.activations == checkpoint.activations
    assert loaded.graph.digest == checkpoint.graph.digest
    assert is_checkpoint(path)


def content(path: Path) -> tuple[dict[str, str], dict[str, list]]:
    """Metadata and tensors; safetensors writes the metadata in any order."""
    tensors = {name: [str(tensor.dtype), tensor.tolist()] for name, tensor in load_file(path).items()}
    return json.loads(_header(path.read_bytes()))["__metadata__"], tensors


def test_saving_again_gives_the_same_content(vit: Checkpoint, saved: Path, tmp_path: Path, stored_graph: None):
    checkpoints.save(checkpoints.load(saved), tmp_path / "again.safetensors")
    assert content(tmp_path / "again.safetensors") == content(saved)


def test_the_file_holds_codes_and_not_the_float_weights(vit: Checkpoint, saved: Path):
    tensors = load_file(saved)
    for layer in vit.graph.layers:
        if layer.has_weight:
            codes = tensors[f"codes:{layer.name}"]
            assert codes.dtype == torch.uint8 and int(codes.max()) < 2 ** vit.plan.bits[layer.name].weight_bits
            assert layer.operands[1].tensor not in tensors
    assert saved.stat().st_size < sum(layer.parameters for layer in vit.graph.layers) * 2


def test_an_existing_file_is_kept(vit: Checkpoint, saved: Path, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists already; give --force"):
        checkpoints.save(vit, path)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]
    checkpoints.save(vit, path, force=True)
    assert content(path) == content(saved)


def test_a_checkpoint_of_another_graph_is_refused(vit: Checkpoint, tmp_path: Path):
    other = vit.plan.model.model_copy(update={"graph_digest": "0" * 64})
    path = tmp_path / "model.safetensors"
    checkpoints.save(Checkpoint(vit.graph, vit.plan.model_copy(update={"model": other}), vit.weights, vit.activations), path)
    with pytest.raises(InputError, match="was made for another graph of vit_tiny_patch16_224; run `vitq profile` again"):
        checkpoints.load(path)


Tensors, Metadata = dict[str, Tensor], dict[str, str]


def _set(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors, Metadata], None]:
    def edit(tensors: Tensors, metadata: Metadata) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return edit


def _drop(name: str) -> Callable[[Tensors, Metadata], None]:
    return lambda tensors, metadata: tensors.__delitem__(name)


def _meta(key: str, change: Callable[[Any], Any]) -> Callable[[Tensors, Metadata], None]:
    def edit(tensors: Tensors, metadata: Metadata) -> None:
        metadata[key] = json.dumps(change(json.loads(metadata[key])))

    return edit


def _with_layer(index: int, **fields: Any) -> Callable[[Any], Any]:
    def change(plan: Any) -> Any:
        plan["layers"][index] |= fields
        return plan

    return change


def _with_model(**fields: Any) -> Callable[[Any], Any]:
    return lambda plan: plan | {"model": plan["model"] | fields}


def _first_activation(change: Callable[[dict], dict]) -> Callable[[Any], Any]:
    return lambda activations: activations | {"x": change(activations["x"])}


FC1 = "blocks.0.mlp.fc1"  # 7 bits
DAMAGE = {
    "no codes": (_drop(f"codes:{FC1}"), "lacks the codes of layer 'blocks.0.mlp.fc1'"),
    "no scale": (_drop(f"scale:{FC1}"), "lacks the codes of layer"),
    "no bias": (_drop(f"{FC1}.bias"), "lacks tensor 'blocks.0.mlp.fc1.bias'"),
    "no position embedding": (_drop("pos_embed"), "lacks tensor 'pos_embed'"),
    "codes of another dtype": (_set(f"codes:{FC1}", lambda t: t.float()), "do not have the weight's shape"),
    "codes of another shape": (_set(f"codes:{FC1}", lambda t: t[1:]), "do not have the weight's shape"),
    "no codes at all": (_set(f"codes:{FC1}", lambda t: t[:0]), "do not have the weight's shape"),
    "scales of another shape": (_set(f"scale:{FC1}", lambda t: t[:, None]), "do not have the weight's shape"),
    "codes too large": (_set(f"codes:{FC1}", lambda t: t + 128), "are no 7-bit codes"),
    "zero point too large": (_set(f"zero_point:{FC1}", lambda t: t + 128), "are no 7-bit codes"),
    "a scale of zero": (_set(f"scale:{FC1}", lambda t: t * 0), "are no 7-bit codes"),
    "a negative scale": (_set(f"scale:{FC1}", lambda t: -t), "are no 7-bit codes"),
    "an infinite scale": (_set(f"scale:{FC1}", lambda t: t / 0), "tensor 'scale:blocks.0.mlp.fc1' holds values that are not finite"),
    "a bias that is no number": (_set(f"{FC1}.bias", lambda t: t * float("nan")), "holds values that are not finite"),
    "a bias of another dtype": (_set(f"{FC1}.bias", lambda t: t.half()), r"is float16 \(256,\), the model has float32 \(256,\)"),
    "a bias of another shape": (_set(f"{FC1}.bias", lambda t: t[:5]), r"is float32 \(5,\), the model has float32 \(256,\)"),
    "a whole position embedding": (_set("pos_embed", lambda t: t.long()), "is int64 .*, the model has float32"),
    "no plan": (lambda tensors, metadata: metadata.pop("plan"), "is damaged: 'plan'"),
    "another format": (lambda tensors, metadata: metadata.update(format="vitq-checkpoint/9"), "format 'vitq-checkpoint/9'"),
    "no format": (lambda tensors, metadata: metadata.clear(), "is not a calibrated model of vitq"),
    "a plan that is no JSON": (lambda tensors, metadata: metadata.update(plan="{"), "is damaged: "),
    "a plan with 9 bits": (_meta("plan", _with_layer(0, weight_bits=9)), "is damaged: "),
    "a plan with fewer weight bits": (_meta("plan", _with_layer(5, weight_bits=2)), "are no 2-bit codes"),
    "a plan with 8 weight bits": (_meta("plan", _with_layer(5, weight_bits=8)), "are no 8-bit codes"),
    "a plan with other activation bits": (_meta("plan", _with_layer(5, activation_bits=3)), "has no 3-bit scale for the input of layer"),
    "a plan with an unknown layer": (_meta("plan", _with_layer(0, name="nothing")), "the plan names layer 'nothing'"),
    "a plan without layers": (_meta("plan", lambda plan: plan | {"layers": []}), "has no entry for layer"),
    "an unknown architecture": (_meta("plan", _with_model(architecture="vit_of_nobody")), "vit_of_nobody"),
    "another architecture": (_meta("plan", _with_model(arguments={"img_size": 32})), "was made for another graph"),
    "no input size": (_meta("plan", _with_model(data_config={})), "input_size None is not"),
    "a foolish input size": (_meta("plan", _with_model(data_config={"input_size": [3, -1, 0]})), r"input_size \[3, -1, 0\] is not"),
    "another input size": (
        _meta("plan", _with_model(data_config={"input_size": [3, 48, 48]})),
        "torch.export cannot capture",
    ),
    "no activations": (_meta("activations", lambda a: {}), "has no 2-bit scale for the input of layer 'patch_embed.proj'"),
    "activations that are no object": (_meta("activations", lambda a: [1]), "is damaged: "),
    "a scale that is text": (_meta("activations", _first_activation(lambda p: p | {"scale": "1"})), "do not go together"),
    "a scale that float32 cannot hold": (_meta("activations", _first_activation(lambda p: p | {"scale": 0.1})), "do not go together"),
    "a zero point between codes": (_meta("activations", _first_activation(lambda p: p | {"zero_point": 1.5})), "do not go together"),
    "a zero point beyond the codes": (_meta("activations", _first_activation(lambda p: p | {"zero_point": 4})), "do not go together"),
    "bits that are true": (_meta("activations", _first_activation(lambda p: p | {"bits": True})), "do not go together"),
    "an error that is text": (_meta("errors", lambda e: {FC1: {"sqnr": None, "kl": "0"}}), "are no numbers"),
    "an error without its KL": (_meta("errors", lambda e: {FC1: {"sqnr": 3.0}}), "is damaged: "),
    "errors that are no object": (_meta("errors", lambda e: [1]), "is damaged: "),
    "origins that are no object": (_meta("made_from", lambda m: 5), "is damaged: "),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_refused_by_name(case: str, saved: Path, tmp_path: Path, stored_graph: None):
    edit, message = DAMAGE[case]
    tensors = load_file(saved)
    metadata = json.loads(_header(saved.read_bytes()))["__metadata__"]
    edit(tensors, metadata)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata=metadata or None)
    with pytest.raises(InputError, match=message):
        checkpoints.load(path)


def test_the_undamaged_file_loads_when_written_the_same_way(saved: Path, tmp_path: Path, stored_graph: None):
    path = tmp_path / "same.safetensors"
    save_file(load_file(saved), path, metadata=json.loads(_header(saved.read_bytes()))["__metadata__"])
    assert checkpoints.load(path).plan == checkpoints.load(saved).plan


def _header(content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + length]


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(length: int, saved: Path, tmp_path: Path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(InputError, match="is damaged: .*; run `vitq calibrate` again"):
        checkpoints.load(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="nothing.safetensors does not exist; `vitq calibrate -o \\S+` writes it"):
        checkpoints.load(tmp_path / "nothing.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"head.weight": torch.zeros(2, 2)}, foreign, metadata={"format": "pt"})
    with pytest.raises(InputError, match="is not a calibrated model of vitq \\(format 'pt'\\)"):
        checkpoints.load(foreign)
    for file in (foreign, tmp_path / "nothing.safetensors", Path(__file__), tmp_path):
        assert not is_checkpoint(file)


@given(changes=st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_of_the_header_never_end_in_a_traceback(
    changes: list[tuple[int, int]], saved: Path, tmp_path: Path, stored_graph: None
):
    """A header with changed bytes is refused, or it still says something whole; never is another exception raised."""
    changed = bytearray(saved.read_bytes())
    for position, byte in changes:
        changed[position % (8 + len(_header(saved.read_bytes())))] = byte
    path = tmp_path / "changed.safetensors"
    path.write_bytes(changed)
    with suppress(InputError):
        checkpoints.load(path)
    is_checkpoint(path)


@pytest.fixture
def stored_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the capture, which takes a second, where the architecture is still the small vit."""
    name, size, arguments = FAMILIES["vit"]
    graph = captured("vit")[1]
    build, rewritten = checkpoints.build, rewrite(graph)

    def fast_build(architecture: str, given: dict[str, Any], num_classes: int, stored: int | None = None) -> Any:
        ours = architecture == name and given == json.loads(json.dumps(arguments)) and num_classes == 10
        return "ours" if ours else build(architecture, given, num_classes, stored)

    def fast_capture(model: Any, shape: tuple[int, int, int], device: str = "cpu") -> Graph:
        if model == "ours" and shape == (3, size, size):
            return graph
        return capture(timm_model("vit") if model == "ours" else model, shape, device)

    monkeypatch.setattr(checkpoints, "build", fast_build)
    monkeypatch.setattr(checkpoints, "capture", fast_capture)
    monkeypatch.setattr(checkpoints, "rewrite", lambda given: rewritten if given is graph else rewrite(given))


def test_a_backbone_goes_through(tmp_path: Path):
    model = timm_model("vit", num_classes=0)
    graph = rewrite(capture(model, (3, 32, 32)))
    checkpoint = calibrate_fast(graph, plan_for(graph, "vit", 6, num_classes=0), in_batches(images(4, 32), 4))
    checkpoints.save(checkpoint, tmp_path / "model.safetensors")
    x = images(2, 32, seed=3)
    with torch.no_grad():
        features = checkpoints.load(tmp_path / "model.safetensors").quantized_module()(x)
        assert features.shape == (2, 64)
        assert float((features - model(x)).norm() / model(x).norm()) < 0.5
