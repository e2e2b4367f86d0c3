"""The artifacts on disk: what is written is read back to the byte, and what was damaged or made up is an InputError that says where."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitq.artifacts import BitPlan, CostTable, Layer, LayerBits, ModelSpec, Operand, Profile, dump, load_plan, load_profile, save
from vitq.errors import InputError, UsageError
from vitq.whole import write_whole

SPEC = ModelSpec(
    architecture="vit_tiny", num_classes=10, data_config={"mean": [0.5, 0.25, 0.1]}, label_names=("cat", "größer"), graph_digest="ab"
)


def operand(tensor: str, role: Any = "plain") -> Operand:
    return Operand(tensor=tensor, role=role, shape=(1, 4))


LAYERS = (
    Layer(
        name="q", type="q", op="linear", block="b0", parameters=16, channels=4, macs=64, operands=(operand("n"), operand("qw", "weight"))
    ),
    Layer(
        name="k", type="k", op="linear", block="b0", parameters=16, channels=4, macs=64, operands=(operand("n"), operand("kw", "weight"))
    ),
    Layer(name="qk", type="qk", op="matmul", block="b0", parameters=0, channels=0, macs=64, operands=(operand("q"), operand("k"))),
)
TABLE = CostTable(
    unit="nats",
    bits=(3, 8),
    tied={"q": (0.1, 0.01), "k": (1e-300, 0.0), "qk": (0.3, 1 / 3)},
    weight={"q": (0.1, 0.0), "k": (0.1, 0.0)},
    activation={"q": (0.1, 0.0), "k": (0.1, 0.0), "qk": (0.1, 0.0)},
    cross={"q": ((0.0, 0.1), (-0.1, 0.0))},
)
PROFILE = Profile(model=SPEC, layers=LAYERS, costs={"output-fisher": TABLE}, rest_bytes=10, made_from={"seed": 0})
PLAN = BitPlan(
    model=SPEC,
    layers=(
        LayerBits(name="q", type="q", weight_bits=3, activation_bits=4),
        LayerBits(name="k", type="k", weight_bits=8, activation_bits=4),
        LayerBits(name="qk", type="qk", weight_bits=None, activation_bits=2),
    ),
    summary={"bops": 2**70},
)


@pytest.mark.parametrize(("artifact", "load"), [(PROFILE, load_profile), (PLAN, load_plan)])
def test_written_and_read_back_is_the_same_to_the_byte(artifact: Any, load: Any, tmp_path: Path) -> None:
    save(artifact, tmp_path / "new" / "a.json")
    loaded = load(tmp_path / "new" / "a.json")
    assert loaded == artifact
    save(loaded, tmp_path / "b.json")
    assert (tmp_path / "new" / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "new"]


def test_an_existing_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"plan\.json exists already; give --force to replace it or -o"):
        save(PLAN, path)
    assert path.read_text() == "mine"
    save(PLAN, path, force=True)
    assert load_plan(path) == PLAN


def test_a_write_that_fails_leaves_nothing_behind_and_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write .*plan\.json: No space left on device; make room there, or choose another place"):
        write_whole(path, half)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("plan.json", "old")]
    with pytest.raises(InputError, match="there is a file where a folder is needed; .*choose another place with -o or --run-dir"):
        save(PLAN, path / "below_a_file" / "plan.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"plan\.json cannot be read as JSON"),
        (dump(PLAN)[:-30], r"plan\.json cannot be read as JSON: .*`vitq allocate --budget 4\.0 --force --run-dir \S+` writes a new one"),
        ("\x00\xff", "is no JSON but another kind of file"),
        ("[]", r"is not a vitq-plan/1 file \(found 'list'\)"),
        (
            dump(PROFILE),
            r"is not a vitq-plan/1 file \(found 'vitq-profile/1'\); `vitq allocate --budget 4\.0 --force --run-dir \S+` writes one",
        ),
        (dump(PLAN).replace("vitq-plan/1", "vitq-plan/2"), r"is not a vitq-plan/1 file \(found 'vitq-plan/2'\)"),
        (dump(PLAN).replace('"bops": ', '"bops": 1e999, "x": '), "1e999 is not a finite number"),
        (dump(PLAN).replace('"bops": ', '"bops": NaN, "x": '), "NaN is not a finite number"),
        ("[" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        (dump(PLAN).replace('"bops": ', '"x": ' + "[" * 200 + "]" * 200 + ', "bops": '), "nested deeper than 100 levels"),
        (dump(PLAN).replace('"weight_bits": 3', '"weight_bits": 9'), r"layers\.0 \(q\)\.weight_bits: Input should be 2, 3, .*8 \(got 9\)"),
        (
            dump(PLAN).replace('"weight_bits": 3', '"weight_bits": "3"'),
            r"layers\.0 \(q\)\.weight_bits: .*\(got '3'\); correct it or write a new one",
        ),
        (dump(PLAN).replace('"type": "qk",', ""), r"layers\.2 \(qk\)\.type: Field required"),
        (dump(PLAN).replace('"type": "qk",', '"type": "qk", "bits": 4,'), r"layers\.2 \(qk\)\.bits: Extra inputs are not permitted"),
    ],
)
def test_a_damaged_plan_says_where_and_what_to_do(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1" if "\xff" in text else "utf-8"))
    with pytest.raises(InputError, match=message):
        load_plan(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan\.json does not exist; `vitq allocate --budget 4\.0 --run-dir \S+` writes it"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(InputError, match=" is a folder; give the file that `vitq profile MODEL --images PATH` writes"):
        load_profile(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["layers"].append(data["layers"][0]), "two layers have the same name"),
        (lambda data: data["layers"][0].update(parameters=-1), r"layers\.0 \(q\)\.parameters: .*greater than or equal to 0"),
        (lambda data: data["layers"][0].update(macs=10**400), r"layers\.0 \(q\)\.macs: .*less than or equal to"),
        (lambda data: data["costs"]["output-fisher"].update(bits=[8, 3]), "bits must be distinct and ascending"),
        (lambda data: data["costs"]["output-fisher"].update(bits=[]), "bits must be distinct and ascending"),
        (lambda data: data["costs"]["output-fisher"]["tied"]["q"].pop(), "tied costs of layer q: 1 values for 2 widths"),
        (
            lambda data: data["costs"]["output-fisher"]["weight"].pop("k"),
            r"metric output-fisher: the weight costs do not cover the layers: \['k'\]",
        ),
        (lambda data: data["costs"]["output-fisher"]["weight"].update(qk=[0, 0]), r"the weight costs do not cover the layers: \['qk'\]"),
        (lambda data: data["costs"]["output-fisher"]["cross"]["q"].pop(), "cross costs of layer q: they are no table of 2 x 2 widths"),
        (lambda data: data["costs"]["output-fisher"]["cross"]["q"][1].pop(), "cross costs of layer q: they are no table of 2 x 2 widths"),
        (
            lambda data: data["costs"]["output-fisher"]["cross"].update(qk=[[0, 0], [0, 0]]),
            r"cross costs of what is no layer with a weight: \['qk'\]",
        ),
    ],
)
def test_an_inconsistent_profile_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(dump(PROFILE))
    change(data)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=message):
        load_profile(path)


def edited(position: int, **changes: Any) -> BitPlan:
    entries = [entry.model_copy(update=changes) if at == position else entry for at, entry in enumerate(PLAN.layers)]
    return PLAN.model_copy(update={"layers": tuple(entries)})


def test_a_plan_that_fits_the_layers_passes() -> None:
    PLAN.check(LAYERS)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (edited(0, name="x"), "the plan names layer 'x', which the model does not have; `vitq show MODEL` lists its layers"),
        (edited(1, name="q"), "the plan names layer 'q' twice; keep one entry"),
        (PLAN.model_copy(update={"layers": PLAN.layers[:2]}), "the plan has no entry for layer 'qk'; every layer needs one"),
        (edited(0, weight_bits=None), "the plan gives layer 'q' no weight_bits; it has a weight: give 2 to 8"),
        (edited(2, weight_bits=4), "the plan gives matmul 'qk' weight_bits 4; a matmul has no weight: give null"),
        (edited(1, activation_bits=5), "layers 'q' and 'k' read the same tensor but have activation_bits 4 and 5; give both the same"),
    ],
)
def test_a_plan_that_does_not_fit_the_layers_is_refused(plan: BitPlan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan.check(LAYERS)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=5)
    | st.sampled_from([2, 8, "vitq-plan/1", 1e308]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "layers", "bits"]) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    pairs = list(data.items() if isinstance(data, dict) else enumerate(data)) if isinstance(data, (dict, list)) else []
    return [(data, key) for key, _ in pairs] + [place for _, value in pairs for place in places(value)]


@given(data=st.data(), value=JSON, remove=st.booleans(), artifact=st.sampled_from([PLAN, PROFILE]))
def test_one_changed_value_is_read_or_an_input_error(
    data: st.DataObject, value: Any, remove: bool, artifact: Any, tmp_path_factory: Any
) -> None:
    """What is read can be written and read again; nothing but InputError is ever raised."""
    document = json.loads(dump(artifact))
    container, key = data.draw(st.sampled_from(places(document)))
    if remove:
        del container[key]
    else:
        container[key] = value
    read_or_refused(json.dumps(document), tmp_path_factory.getbasetemp() / "changed.json")


@given(value=JSON, kind=st.sampled_from(["vitq-plan/1", "vitq-profile/1"]))
def test_any_json_is_read_or_an_input_error(value: Any, kind: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    read_or_refused(json.dumps(value), path)
    if isinstance(value, dict):
        read_or_refused(json.dumps(value | {"format": kind}), path)


@given(content=st.binary(max_size=40))
def test_any_bytes_are_an_input_error(content: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(content)
    for load in (load_plan, load_profile):
        with pytest.raises(InputError):
            load(path)


def read_or_refused(text: str, path: Path) -> None:
    path.write_text(text)
    for load in (load_plan, load_profile):
        try:
            artifact = load(path)
        except InputError as error:
            assert str(error).startswith(str(path)) and len(str(error)) < 1000
        else:
            save(artifact, path, force=True)
            assert load(path) == artifact
            path.write_text(text)
