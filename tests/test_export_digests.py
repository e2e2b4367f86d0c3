"""An exported file that was changed afterwards is caught, and the part that differs is named."""

import random
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from export_checkpoints import make_checkpoint, random_images, small_vit

from vitq.errors import InputError
from vitq.onnx_file import export
from vitq.onnx_file.digests import check_digests

LAYER = "blocks.0.attn.proj"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export(make_checkpoint(small_vit(), weight=3, activation=4), path, [random_images(2, (3, 32, 32))])
    return path


def refused(path: Path, model: onnx.ModelProto) -> str:
    damaged = path.parent / "damaged.onnx"
    damaged.write_bytes(model.SerializeToString())
    with pytest.raises(InputError) as caught:
        check_digests(damaged)
    assert str(caught.value).endswith("; write it again with `vitq export`")
    return str(caught.value)


def node(model: onnx.ModelProto, condition: Callable[[onnx.NodeProto], bool]) -> onnx.NodeProto:
    return next(found for found in model.graph.node if condition(found))


def flip(model: onnx.ModelProto, name: str) -> None:
    """Changes one bit of one byte of an initializer."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    content = bytearray(tensor.raw_data)
    content[len(content) // 2] ^= 4
    tensor.raw_data = bytes(content)


def operand(model: onnx.ModelProto, position: int) -> onnx.NodeProto:
    """What makes an operand of LAYER: its DequantizeLinear."""
    product = node(model, lambda found: found.name == LAYER)
    return node(model, lambda found: product.input[position] in found.output)


def made_by(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return node(model, lambda found: value in found.output)


def codes(model: onnx.ModelProto) -> onnx.NodeProto:
    return made_by(model, operand(model, 1).input[0])


def bias(model: onnx.ModelProto) -> str:
    output = node(model, lambda found: found.name == LAYER).output[0]
    return node(model, lambda found: output in found.input).input[1]


PARTS: dict[str, Callable[[onnx.ModelProto], str]] = {
    "weight scales": lambda model: operand(model, 1).input[1],
    "weight codes": lambda model: codes(model).input[0],
    "weight zero points": lambda model: codes(model).input[2],
    "activation scale": lambda model: operand(model, 0).input[1],
    "activation zero point": lambda model: operand(model, 0).input[2],
    "bias": bias,
}


@pytest.mark.parametrize("part", PARTS)
def test_one_bit_of_a_constant_is_caught_and_named(exported: Path, part: str) -> None:
    model = onnx.load(exported)
    name = PARTS[part](model)
    flip(model, name)
    said = refused(exported, model)
    assert "damaged.onnx is not the file that was exported: " in said
    if part == "activation zero point":  # one constant for all layers whose zero point it is; the first is named
        assert f"{part} of layer " in said and f"(initializer {name!r}) differs" in said
    else:
        assert f"{part} of layer {LAYER} (initializer {name!r}) differs" in said


def entry(model: onnx.ModelProto, key: str) -> onnx.StringStringEntryProto:
    return next(found for found in model.metadata_props if found.key == key)


def spoil_layer(model: onnx.ModelProto) -> None:
    operand(model, 1).op_type = "Identity"


def spoil_output(model: onnx.ModelProto) -> None:
    model.graph.node[-1].doc_string = "x"


def spoil_preprocessing(model: onnx.ModelProto) -> None:
    entry(model, "vitq.preprocessing").value = "{}"


def spoil_function(model: onnx.ModelProto) -> None:
    model.functions[0].node.pop()


def spoil_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 22


def spoil_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


def drop_constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.pop()


def add_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="mine", value="1")


def spoil_digest(model: onnx.ModelProto) -> None:
    entry(model, "vitq.digest").value = '"0"'


def spoil_list(model: onnx.ModelProto) -> None:
    entry(model, "vitq.digests").value = "["


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (spoil_layer, f"the part of the graph that ends in layer {LAYER} differs"),
        (spoil_output, "the part of the graph behind the last layer differs"),
        (spoil_preprocessing, "metadata vitq.preprocessing differs"),
        (spoil_function, "function unpack3 differs"),
        (spoil_opset, "the header (versions, opsets) differs"),
        (spoil_input, "the description of inputs and outputs differs"),
        (drop_constant, "the number of its parts of kind 'initializer' ("),
        (add_metadata, "the number of its parts of kind 'metadata' ("),
        (spoil_digest, "the digest of the whole differs"),
        (spoil_list, "the list of digests differs"),
    ],
)
def test_what_is_no_constant_is_a_part_too(exported: Path, spoil: Callable[[onnx.ModelProto], None], part: str) -> None:
    model = onnx.load(exported)
    spoil(model)
    assert f"is not the file that was exported: {part}" in refused(exported, model)


def test_any_byte_of_the_file_is_caught(exported: Path, tmp_path: Path) -> None:
    content, damaged, chance = exported.read_bytes(), tmp_path / "damaged.onnx", random.Random(0)
    for _ in range(300):
        at, bit = chance.randrange(len(content)), chance.randrange(8)
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        damaged.write_bytes(changed)
        with pytest.raises(InputError, match="damaged.onnx"):
            check_digests(damaged)


def test_an_untouched_file_passes_also_when_written_again_by_onnx(exported: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    onnx.save(onnx.load(exported), again)
    assert check_digests(exported) == check_digests(again) > 100


def test_files_that_hold_no_digests_say_what_to_do(exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    del model.metadata_props[:]
    assert "damaged.onnx holds no digests of its parts, so it cannot be verified: another tool wrote it" in refused(exported, model)
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(InputError, match="text.onnx is damaged, or no ONNX file: it cannot be read as one"):
        check_digests(tmp_path / "text.onnx")
    with pytest.raises(InputError, match="gone.onnx does not exist; `vitq export -o \\S+` writes it"):
        check_digests(tmp_path / "gone.onnx")
