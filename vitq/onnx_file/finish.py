"""The finished file: short names, nothing a runtime does not read, and the metadata that says what it is.

Multiplying nodes keep their layer's name, so that profiles and fused graphs can be read; every other value is named in as few letters as
possible. Shape hints (`value_info`) are left out: onnxruntime plans memory better without them. Model metadata: JSON under `vitq.*`.

Leaves out: any change to what the graph computes.
"""

import itertools
import json
import string
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from vitq import __version__
from vitq.checkpoint import Checkpoint
from vitq.onnx_file.digests import sign
from vitq.onnx_file.lowering import LoweredLayer
from vitq.onnx_file.trace import DOMAIN
from vitq.runtime import NEEDED, circumstances

FORMAT = "vitq-onnx/1"


def finish_file(
    model: ir.Model, layers: Iterable[LoweredLayer], checkpoint: Checkpoint, needed: Mapping[str, str] | None = None
) -> onnx.ModelProto:
    """The ONNX model to write; the values of `layers` carry their final names afterwards.

    Args:
        model: the lowered model.
        layers: its layers.
        checkpoint: what it was made from.
        needed: the session options without which it does not run as fast as it could.
    """
    model.graph.sort()  # torch's exporter puts constants where it needs them, not always before
    passes.RemoveUnusedNodesPass()(model)
    passes.DeduplicateHashedInitializersPass(size_limit=2**31)(model)
    passes.ClearMetadataAndDocStringPass()(model)
    if not model.functions:
        model.opset_imports.pop(DOMAIN, None)
    opset = model.opset_imports[""]
    for node in model.graph:
        _drop_defaults(node, opset)
    keep = {layer.layer.name for layer in layers}
    _shorten(model.graph, keep)
    for function in model.functions.values():
        _shorten(function, set())
    model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.producer_name, model.producer_version = "vitq", __version__
    model.graph.name = "vitq"
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for function in proto.functions:
        del function.value_info[:]
    onnx.helper.set_model_props(proto, _metadata(checkpoint, needed or {}))
    sign(proto)
    return proto


def _drop_defaults(node: ir.Node, opset: int) -> None:
    """Removes attributes that say what onnx assumes anyway."""
    if node.domain:
        return
    schema = onnx.defs.get_schema(node.op_type, opset)
    for name in list(node.attributes):
        default = schema.attributes[name].default_value
        if default.type and onnx.helper.get_attribute_value(default) == onnx.helper.get_attribute_value(ir.to_proto(node.attributes[name])):
            del node.attributes[name]


def _shorten(graph: ir.Graph | ir.Function, keep: set[str]) -> None:
    """Renames values in place to the shortest free names; nodes lose theirs, but for those in `keep`."""
    if isinstance(graph, ir.Graph):
        (graph.inputs[0].name, graph.outputs[0].name) = ("images", "output")
    fixed = {*graph.inputs, *graph.outputs} if isinstance(graph, ir.Graph) else set()
    values = [] if fixed else list(graph.inputs)
    values += list(graph.initializers.values()) if isinstance(graph, ir.Graph) else []
    for node in graph:
        node.name = node.name if node.name in keep else ""
        values += node.outputs
    for index, value in enumerate(values):  # twice: a short name may still be another value's
        if value not in fixed:
            value.name = f"vitq.{index}"
    for value, name in zip((value for value in values if value not in fixed), _names(), strict=False):
        value.name = name


def _names() -> Iterator[str]:
    """a, b, ..., Z, aa, ab, ..."""
    for length in itertools.count(1):
        yield from ("".join(letters) for letters in itertools.product(string.ascii_letters, repeat=length))


def _metadata(checkpoint: Checkpoint, needed: Mapping[str, str]) -> dict[str, str]:
    spec = checkpoint.plan.model
    plan = {entry.name: [entry.weight_bits, entry.activation_bits] for entry in checkpoint.plan.layers}
    values = {
        "format": FORMAT,
        "architecture": spec.architecture,
        "preprocessing": spec.data_config,
        "num_classes": spec.num_classes,
        "label_names": list(spec.label_names),
        "plan": plan,
        "made_from": checkpoint.made_from,
        "versions": {"vitq": __version__, **{package: version(package) for package in ("torch", "timm", "onnx", "onnxruntime")}},
        "verified_with": circumstances(needed),
    }
    named = {f"vitq.{key}": value for key, value in values.items()} | ({NEEDED: needed} if needed else {})
    return {key: json.dumps(value, separators=(",", ":"), ensure_ascii=False) for key, value in named.items()}
