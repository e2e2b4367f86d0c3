"""The calibrated model in one .safetensors: codes, scales, zero points, float tensors, and in its header the plan.

Loading needs neither the original weights nor the images: the architecture is built again with random weights, captured and
rewritten to the same structure, and every tensor is replaced by the stored one.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from vitq.affine import QuantizedWeight, weight_codes
from vitq.artifacts import BitPlan, Layer, ModelSpec
from vitq.commands import writing
from vitq.errors import InputError
from vitq.fakequant import fake_quantize
from vitq.graph import Graph, assign, capture, copy
from vitq.models import LARGEST, build
from vitq.quantizers import Quantizer, from_json, to_json
from vitq.rewrites import fold_layernorms, rewrite
from vitq.whole import refuse_existing, refuse_missing, write_whole

FORMAT = "vitq-checkpoint/1"
_CODES, _SCALE, _ZERO_POINT = "codes:", "scale:", "zero_point:"


@dataclass(frozen=True)
class Checkpoint:
    """A calibrated model.

    `graph` is the float graph whose weights are the dequantized ones, with final biases. `weights` are by layer name, `activations`
    by `Operand.tensor`. `plan` holds the model's specification. `floats` is the folded float graph that it was made from, of the same
    nodes; a file does not hold it. `errors` are each layer's "sqnr" (decibels) and "kl" (nats per image) as calibration found them.
    """

    graph: Graph
    plan: BitPlan
    weights: dict[str, QuantizedWeight]
    activations: Mapping[str, Quantizer]
    made_from: dict[str, Any] = field(default_factory=dict, compare=False)
    floats: Graph | None = field(default=None, compare=False)
    errors: dict[str, dict[str, float | None]] = field(default_factory=dict, compare=False)

    def quantized_module(self) -> GraphModule:
        """The fake-quantized graph: a module from images (B, 3, H, W) to the output."""
        return fake_quantize(self.graph, self.activations)


def save(checkpoint: Checkpoint, path: str | Path, force: bool = False) -> None:
    """Writes the checkpoint; the file appears whole or not at all. Raises UsageError where it exists and `force` is not set."""
    refuse_existing(path, force)
    quantized = {layer.operands[1].tensor for layer in checkpoint.graph.layers if layer.name in checkpoint.weights}
    tensors: dict[str, Tensor] = {
        name: value.detach().contiguous() for name, value in checkpoint.graph.module.state_dict().items() if name not in quantized
    }
    for name, weight in checkpoint.weights.items():
        tensors |= {_CODES + name: weight.codes, _SCALE + name: weight.scale, _ZERO_POINT + name: weight.zero_point}
    metadata = {
        "format": FORMAT,
        "plan": checkpoint.plan.model_dump_json(),
        "activations": json.dumps({name: to_json(quantizer) for name, quantizer in checkpoint.activations.items()}),
        "made_from": json.dumps(checkpoint.made_from),
        "errors": json.dumps(checkpoint.errors),
    }
    tensors = {name: value.cpu().contiguous().clone() for name, value in tensors.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load(path: str | Path, device: str = "cpu") -> Checkpoint:
    """Reads a checkpoint that `save` wrote.

    Raises:
        InputError: the file is missing, damaged, of another kind, or made for another graph (another torch or timm).
    """
    path = Path(path)
    tensors, plan, activations, made_from, errors = _read(path)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    spec = plan.model
    size, stored = _input_size(path, spec), sum(tensor.numel() for tensor in tensors.values())
    graph = rewrite(capture(build(spec.architecture, spec.arguments, spec.num_classes, stored), size, device))
    if graph.digest != spec.graph_digest:
        raise InputError(f"{path} was made for another graph of {spec.architecture}; run `vitq profile` again with this torch and timm")
    graph = fold_layernorms(graph)
    plan.check(graph.layers)
    bits = plan.bits
    weights = {layer.name: _weight(path, tensors, layer, bits[layer.name].weight_bits) for layer in graph.layers if layer.has_weight}
    stored = {layer.operands[1].tensor: weights[layer.name].dequantize() for layer in graph.layers if layer.has_weight}
    module = copy(graph)
    values = {}
    for name, value in module.state_dict().items():
        if name not in stored and name not in tensors:
            raise InputError(f"{path} lacks tensor {name!r}; {_again(path)}")
        values[name] = stored.get(name, tensors.get(name))
        if (found := _form(values[name])) != _form(value):
            raise InputError(f"{path}: tensor {name!r} is {found}, the model has {_form(value)}; {_again(path)}")
    assign(module, values)
    module.recompile()
    graph = Graph(module, graph.input_shape, graph.layers, graph.nodes, graph.blocks)
    for layer in graph.layers:
        for operand in layer.activations:
            if operand.tensor not in activations or activations[operand.tensor].bits != bits[layer.name].activation_bits:
                wanted = bits[layer.name].activation_bits
                raise InputError(f"{path} has no {wanted}-bit scale for the input of layer {layer.name!r}; {_again(path)}")
    return Checkpoint(graph, plan, weights, activations, made_from, errors=errors)


def read_plan(path: str | Path) -> tuple[BitPlan, dict[str, Any]]:
    """The plan of a checkpoint and what it was made from, without building the model; errors as those of `load`."""
    _, plan, _, made_from, _ = _read(Path(path))
    return plan, made_from


def read_errors(path: str | Path) -> dict[str, dict[str, float | None]]:
    """Each layer's "sqnr" and "kl" as calibration found them, without building the model; errors as those of `load`."""
    return _read(Path(path))[-1]


def is_checkpoint(path: str | Path) -> bool:
    """Whether a file is a calibrated model of this tool, by its header alone."""
    try:
        with Path(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < _LARGEST_HEADER else {}
    except (OSError, ValueError, struct.error):
        return False
    return isinstance(header, dict) and isinstance(header.get("__metadata__"), dict) and header["__metadata__"].get("format") == FORMAT


def _input_size(path: Path, spec: ModelSpec) -> tuple[int, int, int]:
    size = spec.data_config.get("input_size")
    if not (isinstance(size, list | tuple) and len(size) == 3 and all(type(length) is int and 0 < length <= LARGEST for length in size)):
        raise InputError(f"{path} is damaged: input_size {size!r} is not [channels, height, width]; {_again(path)}")
    return size[0], size[1], size[2]


_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


_Read = tuple[dict[str, Tensor], BitPlan, dict[str, Quantizer], dict[str, Any], dict[str, dict[str, float | None]]]


def _read(path: Path) -> _Read:
    refuse_missing(path, "vitq calibrate")
    if path.suffix in (".json", ".onnx", ".html"):
        raise InputError(f"{path} is no calibrated model; give the .safetensors that `vitq calibrate` writes")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                found = metadata.get("format")
                raise InputError(f"{path} is not a calibrated model of vitq (format {found!r}); give one that `vitq calibrate` wrote")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        plan = BitPlan.model_validate_json(metadata["plan"])
        activations = {name: from_json(entry) for name, entry in json.loads(metadata["activations"]).items()}
        made_from = dict(json.loads(metadata.get("made_from", "{}")))
        errors = {name: _layer_error(**entry) for name, entry in json.loads(metadata.get("errors", "{}")).items()}
    except (SafetensorError, ValidationError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{path} is damaged: {reason}; {_again(path)}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: tensor {name!r} holds values that are not finite; {_again(path)}")
    return tensors, plan, activations, made_from, errors


def _layer_error(sqnr: float | None, kl: float) -> dict[str, float | None]:
    if not (isinstance(kl, float) and (sqnr is None or isinstance(sqnr, float))):
        raise ValueError(f"sqnr {sqnr!r} and kl {kl!r} of a layer are no numbers")
    return {"sqnr": sqnr, "kl": kl}


def _weight(path: Path, tensors: dict[str, Tensor], layer: Layer, bits: int | None) -> QuantizedWeight:
    codes, scale, zero_point = (tensors.get(prefix + layer.name) for prefix in (_CODES, _SCALE, _ZERO_POINT))
    if bits is None or codes is None or scale is None or zero_point is None:
        raise InputError(f"{path} lacks the codes of layer {layer.name!r}; {_again(path)}")
    forms = (torch.uint8, layer.operands[1].shape), (torch.float32, (layer.channels,)), (torch.uint8, (layer.channels,))
    if tuple((part.dtype, tuple(part.shape)) for part in (codes, scale, zero_point)) != forms:
        raise InputError(f"{path}: the codes of layer {layer.name!r} do not have the weight's shape; {_again(path)}")
    lowest, highest = weight_codes(bits)
    in_range = lowest <= int(codes.min()) and int(codes.max()) <= highest and int(zero_point.max()) <= highest
    if not in_range or float(scale.min()) <= 0 or (bits >= 7 and bool((zero_point != 2 ** (bits - 1)).any())):
        raise InputError(f"{path}: the codes of layer {layer.name!r} are no {bits}-bit codes; {_again(path)}")
    return QuantizedWeight(codes, scale, zero_point, bits)


def _again(path: Path) -> str:
    return f"run `{writing('vitq calibrate', path)}` again"


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
