"""What is fuzzed: for every kind of file that vitq reads, a valid one, and the commands that read it.

`read` puts content in the valid file's place in a folder of its own and runs the commands. Each must end by itself, with a result or with a
message of `VitqError`; any other exception comes out. What would be computed from a file that is accepted is cut off where it gets long.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import onnx
from cli_session import make_chain, vitq

from vitq.artifacts import WIDTHS, Profile, load_profile, save
from vitq.errors import UsageError
from vitq.latency import LatencyTable, Timing

MADE = ("profile.json", "plan.json", "model.safetensors", "model.onnx", "evaluate.json", "bench.json", "latency.json", "staircase.json")


@dataclass(frozen=True)
class Target:
    """A file of the session, the commands that read it, and the files of the run folder that they need beside it."""

    file: str
    commands: tuple[tuple[object, ...], ...]
    beside: tuple[str, ...] = ()


RUN = "vitq-run/"
TARGETS = {
    "profile": Target(
        RUN + "profile.json", (("show", RUN + "profile.json"), ("allocate", "--budget", "4", "--force"), ("report", "--force"))
    ),
    "plan": Target(RUN + "plan.json", (("show", RUN + "plan.json"), ("calibrate", "--force"), ("report", "--force")), ("profile.json",)),
    "staircase": Target(RUN + "staircase.json", (("show", RUN + "staircase.json"), ("report", "--force")), ("profile.json",)),
    "latency": Target(RUN + "latency.json", (("allocate", "--budget", "latency=1ms", "--force"), ("report", "--force")), ("profile.json",)),
    "evaluations": Target(RUN + "evaluate.json", (("report", "--force"),), ("profile.json", "plan.json")),
    "benchmark": Target(RUN + "bench.json", (("report", "--force"),), ("profile.json", "plan.json")),
    "config": Target("model/config.json", (("show", "model"),)),
    "weights": Target("model/model.safetensors", (("show", "model"),)),
    "checkpoint": Target(RUN + "model.safetensors", (("export", "--force"), ("report", "--force"))),
    "images": Target(
        "images.safetensors", (("show", "images.safetensors"), ("profile", "model", "--images", "images.safetensors", "--force"))
    ),
    "onnx": Target(RUN + "model.onnx", (("show", RUN + "model.onnx"), ("evaluate", RUN + "model.onnx", "--verify"), ("report", "--force"))),
    "pth": Target("model.pth", (("show", "model.pth", "--arch", "vit_tiny_patch16_224"),)),
}


def make_session(folder: Path) -> Path:
    """A session with one of every file."""
    import torch
    from safetensors.torch import load_file

    assert all(done.code == 0 for done in make_chain(folder))
    for command in (
        ("evaluate", RUN + "model.onnx", "--images", "images"),
        ("bench", "--rounds", 1),
        ("allocate", "--pareto", RUN + "staircase.json", "--bits", "4,8"),
        ("synthesize", "model", "--num-images", 2, "--iterations", 1, "-o", "images.safetensors"),
    ):
        done = vitq(*command, folder=folder)
        assert done.code == 0, done.err
    save(table_for(load_profile(folder / "vitq-run" / "profile.json")), folder / "vitq-run" / "latency.json")
    torch.save({"state_dict": load_file(folder / "model" / "model.safetensors")}, folder / "model.pth")
    return folder


def table_for(profile: Profile) -> LatencyTable:
    """Latencies that nobody measured: a microsecond at any width."""
    timings = [
        Timing(layers=(layer.name,), weight_bits=WIDTHS if layer.has_weight else None, activation_bits=WIDTHS, ms=0.001)
        for layer in profile.layers
    ]
    model = profile.model
    return LatencyTable(
        architecture=model.architecture, graph_digest=model.graph_digest, batch=1, threads=1, rest_ms=0.1, timings=tuple(timings)
    )


@contextmanager
def cut_short():
    """Nothing is computed from what was accepted."""

    def reached(*_: object, **__: object) -> None:
        raise UsageError("what is fuzzed was accepted")

    with (
        mock.patch("vitq.calibration.calibrate", reached),
        mock.patch("vitq.importance.profile", reached),
        mock.patch("vitq.onnx_file.export", reached),
        mock.patch("vitq.rewrites.prepare", reached),
    ):
        yield


def reader(name: str, session: Path) -> Callable[[bytes], None]:
    """What reads content in the place of a target's file."""
    target = TARGETS[name]
    folder = Path(tempfile.mkdtemp(dir=session.parent))
    shutil.copytree(session / "images", folder / "images")
    shutil.copytree(session / "model", folder / "model")
    (folder / "vitq-run").mkdir()
    for beside in target.beside:
        shutil.copy(session / "vitq-run" / beside, folder / "vitq-run")

    def read(content: bytes) -> None:
        (folder / target.file).write_bytes(content)
        with cut_short():
            for command in target.commands:
                done = vitq(*command, folder=folder)
                assert done.code in (0, 2, 3, 4), done.err
                assert done.code == 0 or done.err.strip()
        for made in folder.glob("vitq-run/*"):
            if made.name not in target.beside and made != folder / target.file:
                made.unlink()

    return read


# Documents inside files: as JSON, and back.


def document_of(name: str, content: bytes) -> object:
    """The JSON values that a target's file holds."""
    if TARGETS[name].file.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        for key, value in header.get("__metadata__", {}).items():
            header["__metadata__"][key] = _parsed(value)
        return header
    if name == "onnx":
        return {entry.key: _parsed(entry.value) for entry in onnx.ModelProto.FromString(content).metadata_props}
    return json.loads(content)


def content_with(name: str, content: bytes, document: object) -> bytes:
    """The file with other JSON values in it."""
    if TARGETS[name].file.endswith(".safetensors"):
        (length,) = struct.unpack("<Q", content[:8])
        if isinstance(document, dict) and isinstance(document.get("__metadata__"), dict):
            texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in document["__metadata__"].items()}
            document = {**document, "__metadata__": texts}
        header = json.dumps(document).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if name == "onnx":
        model = onnx.ModelProto.FromString(content)
        del model.metadata_props[:]
        for key, value in document.items() if isinstance(document, dict) else ():
            text = value if isinstance(value, str) else json.dumps(value)
            model.metadata_props.add(key=key.encode("utf-8", "replace").decode(), value=text.encode("utf-8", "replace").decode())
        return model.SerializeToString()
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
