"""`vitq evaluate --verify`: an exported file that was damaged is refused before anything is measured on it."""

import shutil
from pathlib import Path

import onnx
import pytest
from cli_session import vitq


def test_an_untouched_file_passes_alone_and_before_its_evaluation(session: Path, tmp_path: Path):
    alone = vitq("evaluate", "vitq-run/model.onnx", "--verify", folder=session)
    assert (alone.code, alone.err) == (0, "next: vitq evaluate vitq-run/model.onnx --images PATH\n")
    assert "vitq-run/model.onnx is the file that was exported: all " in alone.out
    moved = shutil.copy(session / "vitq-run" / "model.onnx", tmp_path / "moved.onnx")
    document = vitq("evaluate", moved, "--verify", "--json", "-o", tmp_path / "said.json").document
    assert document["verified"] is True and document["parts"] > 100
    assert (tmp_path / "said.json").exists() and not (session / "vitq-run" / "evaluate.json").exists()
    both = vitq("evaluate", "vitq-run/model.onnx", "--verify", "--images", "images", "--num-images", 8, "--json", folder=session)
    assert both.document["num_images"] == 8
    assert both.document["verified"] is True


def test_one_byte_of_one_scale_is_caught(finished: Path, tmp_path: Path):
    content = (finished / "vitq-run" / "model.onnx").read_bytes()
    model = onnx.load_from_string(content)
    product = next(node for node in model.graph.node if node.name == "blocks.1.mlp.fc1")
    scales = next(node for node in model.graph.node if product.input[1] in node.output).input[1]
    raw = next(tensor for tensor in model.graph.initializer if tensor.name == scales).raw_data
    assert content.count(raw) == 1
    damaged = bytearray(content)
    damaged[content.index(raw) + 8] ^= 1
    (tmp_path / "damaged.onnx").write_bytes(damaged)
    done = vitq("evaluate", "damaged.onnx", "--verify", "--images", finished / "images", folder=tmp_path)
    assert (done.code, done.out) == (3, "")
    said = f"weight scales of layer blocks.1.mlp.fc1 (initializer {scales!r}) differs; write it again with `vitq export`"
    assert done.err == f"vitq: damaged.onnx is not the file that was exported: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("vitq-run/model.safetensors", "--verify"), 2, "vitq-run/model.safetensors is none, give a .onnx or leave --verify out"),
        (("vitq-run/model.onnx", "--verify", "--min-top1", 50), 2, "gates need images to measure on; give --images PATH"),
        (("vitq-run/model.onnx",), 2, "give --images PATH, or --verify to check an ONNX file alone"),
        (("gone.onnx", "--verify"), 3, "gone.onnx does not exist"),
    ],
)
def test_faults(finished: Path, arguments: tuple[object, ...], code: int, message: str):
    done = vitq("evaluate", *arguments, folder=finished)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
