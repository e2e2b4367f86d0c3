"""Digests of a file's parts, kept in its own metadata: a file that was changed or damaged since is told from the one that was exported.

Everything in the file belongs to one part: each initializer, each stretch of nodes up to a layer's, each function, each entry of the
metadata, and what is left of the graph and of the model. `vitq.digest` is the sha256 over all of them and decides; `vitq.digests` has
six bytes of each part's, enough to name the one that differs.

Leaves out: forgery. Whoever changes a file on purpose can write its digests anew.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from vitq.commands import writing
from vitq.errors import InputError
from vitq.onnx_file.file import load_file
from vitq.whole import refuse_missing

DIGEST, DIGESTS = "vitq.digest", "vitq.digests"
_CHARACTERS = 8  # of base64: six bytes
_NODE_INPUTS = {
    ("QuantizeLinear", 1): "activation scale",
    ("QuantizeLinear", 2): "activation zero point",
    ("DequantizeLinear", 0): "weight codes",
    ("DequantizeLinear", 1): "weight scales",
    ("MatMul", 1): "weight",
    ("Add", 1): "bias",
    ("Sub", 1): "activation zero point",
    ("Mul", 1): "weight scales",
    ("Conv", 2): "bias",
}


def sign(model: onnx.ModelProto) -> None:
    """Writes the digests of a finished model's parts into its metadata; nothing may be changed afterwards."""
    digests = _digests(model)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    entries |= {DIGEST: json.dumps(_whole(digests)), DIGESTS: json.dumps(_short(digests), separators=(",", ":"))}
    onnx.helper.set_model_props(model, entries)


def check_digests(path: str | Path) -> int:
    """Compares a file's parts with the digests that it was written with.

    Returns:
        How many parts there are.

    Raises:
        InputError: the file is missing, is no ONNX file, holds no digests, or a part differs: the first one is named.
    """
    refuse_missing(path, "vitq export")
    again = f"write it again with `{writing('vitq export', path)}`"
    try:
        model = load_file(Path(path))
        entries = {entry.key: entry.value for entry in model.metadata_props}
    except Exception:  # protobuf, whose error this is, comes with onnx
        raise InputError(f"{path} is damaged, or no ONNX file: it cannot be read as one; {again}") from None
    if DIGEST not in entries or DIGESTS not in entries:
        raise InputError(
            f"{path} holds no digests of its parts, so it cannot be verified: another tool wrote it, or an older vitq; {again}"
        )
    try:
        digests = _digests(model)
        differing = _differing(model, digests, json.loads(entries[DIGESTS]))
    except (ValueError, TypeError, AttributeError, KeyError):
        differing = "the list of digests"
    if differing is None and entries[DIGEST] != json.dumps(_whole(digests)):
        differing = "the digest of the whole"
    if differing is not None:
        raise InputError(f"{path} is not the file that was exported: {differing} differs; {again}")
    return sum(map(len, digests.values()))


def _digests(model: onnx.ModelProto) -> dict[str, list[bytes]]:
    """The sha256 of every part, by kind, in the order of the file."""
    graph, rest = onnx.GraphProto(), onnx.ModelProto()
    graph.CopyFrom(model.graph)
    del graph.node[:], graph.initializer[:]
    rest.CopyFrom(model)
    rest.ClearField("graph")
    del rest.functions[:], rest.metadata_props[:]
    return {
        "initializer": [_sha256(tensor) for tensor in model.graph.initializer],
        "nodes": [_sha256(*stretch) for stretch in _stretches(model.graph)],
        "function": [_sha256(function) for function in model.functions],
        "metadata": [_sha256(entry) for entry in model.metadata_props if entry.key not in (DIGEST, DIGESTS)],
        "graph": [_sha256(graph)],
        "model": [_sha256(rest)],
    }


def _stretches(graph: onnx.GraphProto) -> Iterator[list[onnx.NodeProto]]:
    """The nodes, cut behind each that bears a layer's name."""
    stretch = []
    for node in graph.node:
        stretch.append(node)
        if node.name:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _sha256(*messages: Any) -> bytes:
    return hashlib.sha256(b"".join(message.SerializeToString(deterministic=True) for message in messages)).digest()


def _whole(digests: dict[str, list[bytes]]) -> str:
    parts = [f"{kind} {len(found)}\n".encode() + b"".join(found) for kind, found in digests.items()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _short(digests: dict[str, list[bytes]]) -> dict[str, str]:
    return {kind: "".join(_shortened(digest) for digest in found) for kind, found in digests.items()}


def _shortened(digest: bytes) -> str:
    return base64.b64encode(digest[: _CHARACTERS * 6 // 8]).decode()


def _differing(model: onnx.ModelProto, found: dict[str, list[bytes]], exported: dict[str, str]) -> str | None:
    """The first part that is not as it was exported, in words; None where all are."""
    for kind, digests in found.items():
        wanted = [exported[kind][at : at + _CHARACTERS] for at in range(0, len(exported[kind]), _CHARACTERS)]
        if len(wanted) != len(digests):
            return f"the number of its parts of kind {kind!r} ({len(digests)}, exported were {len(wanted)})"
        for at, (digest, short) in enumerate(zip(digests, wanted, strict=True)):
            if _shortened(digest) != short:
                return _name(model, kind, at)
    return None


def _name(model: onnx.ModelProto, kind: str, at: int) -> str:
    """A part in words: what it is to which layer."""
    if kind == "initializer":
        return _role(model.graph, model.graph.initializer[at].name)
    if kind == "nodes":
        last = list(_stretches(model.graph))[at][-1].name
        return f"the part of the graph that ends in layer {last}" if last else "the part of the graph behind the last layer"
    if kind == "function":
        return f"function {model.functions[at].name}"
    if kind == "metadata":
        return f"metadata {[entry.key for entry in model.metadata_props if entry.key not in (DIGEST, DIGESTS)][at]}"
    return "the description of inputs and outputs" if kind == "graph" else "the header (versions, opsets)"


def _role(graph: onnx.GraphProto, name: str) -> str:
    """What a constant is to the first node that reads it, and of which layer that node is part."""
    reader = next((node for node in graph.node if name in node.input), None)
    if reader is None:
        return f"initializer {name!r}"
    position = list(reader.input).index(name)
    what = _NODE_INPUTS.get((reader.op_type, position), "constant")
    if reader.op_type.startswith("unpack"):
        what = "weight zero points" if position == len(reader.input) - (1 if reader.op_type == "unpack4" else 2) else "weight codes"
    layer = _layer(graph, reader)
    return f"{what} of layer {layer} (initializer {name!r})" if layer else f"a constant of {reader.op_type} (initializer {name!r})"


def _layer(graph: onnx.GraphProto, node: onnx.NodeProto) -> str:
    """The layer that a node around a MatMul or Conv belongs to; "" for a float op."""
    makers = {output: maker for maker in graph.node for output in maker.output}
    if node.op_type == "Add":  # of a bias: directly behind the layer
        return next((makers[value].name for value in node.input if value in makers), "")
    for step in range(6):  # no pattern is longer
        if node.name or (node.op_type not in _BEFORE_LAYER and not node.op_type.startswith("unpack")):
            return node.name
        following = next((reader for reader in graph.node if node.output[0] in reader.input), None)
        if following is None or (step == 0 and node.op_type in ("Sub", "Mul") and following.op_type != "Conv"):  # a float op's
            return ""
        node = following
    return ""


_BEFORE_LAYER = {"QuantizeLinear", "Clip", "DequantizeLinear", "Cast", "Sub", "Mul", "Reshape", "Transpose"}
