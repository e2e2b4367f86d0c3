"""The commands on a tiny model: four bare ones after each other, what they remember, what they print, and `show` and `evaluate`."""

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cli_session import CLASSES, NUM_IMAGES, Done, environment, make_chain, make_images, make_model, vitq
from huggingface_hub import ModelCard

import vitq as vitq_package
from vitq import checkpoint
from vitq.accuracy import onnx_runnable
from vitq.artifacts import load_plan, load_profile, save
from vitq.cli.demo import looking_at
from vitq.errors import UsageError
from vitq.images import open_images, read_image
from vitq.models import load
from vitq.runtime import onnx_metadata
from vitq.whole import locked


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Done]]:
    folder = tmp_path_factory.mktemp("chain")
    return folder, make_chain(folder)


@pytest.fixture
def session(chain: tuple[Path, list[Done]], tmp_path: Path) -> Path:
    """A copy of the finished session, free to be changed."""
    return shutil.copytree(chain[0], tmp_path / "session")


def test_four_bare_commands_make_a_run_folder(chain: tuple[Path, list[Done]]):
    folder, said = chain
    assert [done.code for done in said] == [0, 0, 0, 0], [done.err for done in said]
    assert {path.name for path in (folder / "vitq-run").iterdir()} == {"profile.json", "plan.json", "model.safetensors", "model.onnx"}
    followups = ["vitq allocate --budget 4.0", "vitq calibrate", "vitq export", "vitq evaluate vitq-run/model.onnx --images PATH"]
    assert [done.err.strip().splitlines()[-1] for done in said] == [f"next: {command}" for command in followups]
    assert ["preprocessing: RGB" in done.err for done in said] == [True, False, False, False]
    begun = ["profile: 24 images ...", None, "calibrate: 24 images ...", "export: 24 images ..."]  # there is no terminal here
    assert all(line is None or line in done.err.splitlines() for done, line in zip(said, begun, strict=True))
    assert "/" not in load_profile(folder / "vitq-run" / "profile.json").made_from["model"]["source"]
    plan = load_plan(folder / "vitq-run" / "plan.json")
    assert plan.made_from["images"] | {"digest": ""} == {"source": "images", "num_images": 24, "seed": 0, "digest": ""}
    assert plan.summary["average_weight_bits"] <= 4
    onnx.checker.check_model(onnx.load(folder / "vitq-run" / "model.onnx"))


def test_evaluate_equals_a_computation_by_hand(session: Path):
    done = vitq("evaluate", "vitq-run/model.onnx", "--images", "images", "--json", folder=session)
    assert done.code == 0, done.err
    loaded = load(str(session / "model"))
    runtime = onnxruntime.InferenceSession(session / "vitq-run" / "model.onnx", providers=["CPUExecutionProvider"])
    images = open_images(session / "images", loaded.data_config, None)
    right, agreeing, kl = [], [], []
    for batch, labels in images:
        given = torch.from_numpy(runtime.run(None, {"images": batch.numpy()})[0])
        with torch.no_grad():
            wanted = loaded.module(batch)
        right += (given.argmax(1) == labels).tolist()
        agreeing += (given.argmax(1) == wanted.argmax(1)).tolist()
        kl += (wanted.softmax(1) * (wanted.log_softmax(1) - given.log_softmax(1))).sum(1).tolist()
    found = done.document
    assert found["num_images"] == NUM_IMAGES
    assert found["digest"] == hashlib.sha256((session / "vitq-run" / "model.onnx").read_bytes()).hexdigest()
    assert found["top1"] == pytest.approx(100 * np.mean(right))
    assert found["agreement"] == pytest.approx(100 * np.mean(agreeing))
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-4)
    assert found["kl_margin"] == pytest.approx(1.96 * np.std(kl) / NUM_IMAGES**0.5, rel=1e-3)
    assert found["top5"] == 100  # of five classes
    assert {"top1_margin", "top1_change", "top1_change_margin", "agreement_margin"} <= set(found)
    assert json.loads((session / "vitq-run" / "evaluate.json").read_text()) == {"model.onnx": found}


def test_preprocessing_is_said_again_where_asked_or_unknown(session: Path):
    command = ("evaluate", "vitq-run/model.onnx", "--images", "images", "--num-images", 4)
    once, asked, quiet = (vitq(*command, *more, folder=session) for more in ((), ("--verbose",), ("--quiet",)))
    assert "preprocessing" not in once.err and "preprocessing: RGB" in asked.err and quiet.err == ""
    assert "evaluate: 4 images ..." in once.err.splitlines()
    shutil.copy(session / "vitq-run" / "model.onnx", session / "alone.onnx")
    assert "preprocessing: RGB" in vitq("evaluate", "alone.onnx", *command[2:], folder=session).err
    config = json.loads((session / "model" / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.25] * 3
    (session / "model" / "config.json").write_text(json.dumps(config))
    assert "minus mean (0.25, 0.25, 0.25)" in vitq("calibrate", "--num-images", 8, "--force", folder=session).err


def test_evaluations_gather_in_the_run_folder(session: Path):
    for artifact in ("vitq-run/model.safetensors", "vitq-run/model.onnx", "vitq-run/model.onnx"):
        assert vitq("evaluate", artifact, "--images", "images", "--num-images", 8, folder=session).code == 0
    assert list(json.loads((session / "vitq-run" / "evaluate.json").read_text())) == ["model.safetensors", "model.onnx"]
    assert vitq("evaluate", "model", "--images", "images", "--num-images", 8, folder=session).code == 0
    assert not (session / "evaluate.json").exists()  # a float model has no run folder


def test_symmetric_weights_for_other_runtimes(session: Path):
    refused = vitq("export", "--storage", "standard", "--force", folder=session)
    assert refused.code == 2 and "run `vitq calibrate --symmetric --force`, or give --storage packed" in refused.err
    done = vitq("calibrate", "--symmetric", "--force", folder=session)
    assert done.code == 0, done.err
    assert checkpoint.load(session / "vitq-run" / "model.safetensors").made_from["calibration"]["symmetric"] is True
    done = vitq("export", "--storage", "standard", "--force", folder=session)
    assert done.code == 0, done.err
    assert "onnxruntime has no integer kernel for int4, and is slower there than in float32" in done.err
    assert vitq("evaluate", "vitq-run/model.onnx", "--verify", folder=session).code == 0


def test_a_file_for_one_batch_with_int8_keys_and_values(session: Path):
    before = vitq("evaluate", "vitq-run/model.onnx", "--images", "images", "--json", folder=session).document
    done = vitq("export", "--attention-int8", "--opset", 23, "--batch", 4, "--force", folder=session)
    assert done.code == 0, done.err
    assert "sessions that run it should set session.qdqisint8allowed=1 (`vitq.session_options` in its metadata)" in done.err
    assert vitq("evaluate", "vitq-run/model.onnx", "--verify", folder=session).code == 0
    found = vitq("evaluate", "vitq-run/model.onnx", "--images", "images", "--json", folder=session).document
    assert found["num_images"] == before["num_images"] and found["kl"] == pytest.approx(before["kl"], abs=1e-4)
    rows = vitq("bench", "--batch", 4, "--rounds", 2, "--json", folder=session).document["results"]
    assert [row["batch"] for row in rows] == [4]
    refused = vitq("bench", "--rounds", 2, folder=session)
    assert refused.code == 3 and "takes batches of 4 only; give --batch 4, or export it with a dynamic batch" in refused.err


def test_a_model_card(session: Path):
    done = vitq("export", "--card", "--attention-int8", "--force", folder=session)
    assert done.code == 0, done.err
    assert "README.md" in done.out
    card = ModelCard.load(session / "vitq-run" / "README.md", ignore_metadata_errors=False)
    assert (card.data.library_name, card.data.pipeline_tag) == ("onnx", "image-classification")
    assert f"logits of {CLASSES} classes" in card.text
    plan = load_plan(session / "vitq-run" / "plan.json")
    for bits in {entry.activation_bits for entry in plan.layers}:
        weights, inputs = (sum(getattr(entry, name) == bits for entry in plan.layers) for name in ("weight_bits", "activation_bits"))
        assert f"| {bits} | {weights} | {inputs} |" in card.text
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert 'add_session_config_entry("session.qdqisint8allowed", "1")' in snippet
    names: dict[str, np.ndarray] = {}
    exec(compile(snippet.replace("model.onnx", str(session / "vitq-run" / "model.onnx")), "README.md", "exec"), names)
    assert names["output"].shape == (1, CLASSES)
    refused = vitq("export", "--card", "-o", "vitq-run/other.onnx", folder=session)
    assert refused.code == 2 and "README.md exists already" in refused.err


def test_evaluate_proposes_what_is_not_there_yet(session: Path):
    command = ("evaluate", "vitq-run/model.onnx", "--images", "images", "--num-images", 8)
    assert vitq(*command, folder=session).err.endswith("next: vitq bench --baselines\n")
    (session / "vitq-run" / "bench.json").write_text("{}")
    assert vitq(*command, folder=session).err.endswith("next: vitq report\n")
    (session / "vitq-run" / "report.html").touch()
    assert vitq(*command, folder=session).err.endswith("next: vitq report --force\n")


def test_evaluate_a_model_against_itself(session: Path):
    found = vitq("evaluate", "model", "--reference", "model", "--images", "images", "--json", folder=session).document
    assert (found["agreement"], found["top1_change"]) == (100, 0)
    assert found["kl"] == pytest.approx(0, abs=1e-9)


def test_evaluate_away_from_the_run_folder_has_no_reference(session: Path):
    shutil.move(session / "vitq-run" / "model.onnx", session / "alone.onnx")
    found = vitq("evaluate", "alone.onnx", "--images", "images", "--json", folder=session)
    assert "top1" in found.document and "kl" not in found.document, found.err
    found = vitq("evaluate", "alone.onnx", "--images", "images", "--json", "--reference", "model", folder=session)
    assert found.document["kl"] > 0


def test_unlabelled_images_have_no_top1(session: Path):
    flat = session / "flat"
    flat.mkdir()
    for path in (session / "images").rglob("*.png"):
        shutil.copy(path, flat)
    found = vitq("evaluate", "vitq-run/model.onnx", "--images", "flat", "--json", folder=session)
    assert set(found.document) == {"num_images", "digest", "agreement", "agreement_margin", "kl", "kl_margin"}
    shutil.rmtree(session / "images" / "class0")  # labels would mean other classes than the model's
    found = vitq("evaluate", "vitq-run/model.onnx", "--images", "images", "--json", folder=session)
    assert "top1" not in found.document and "has no labels of the model's 5 classes" in found.err
    assert "give 5 folders whose names, in natural order (class2 before class10), stand for classes 0 to 4" in found.err


@pytest.mark.parametrize(
    ("gate", "limit", "code"),
    [("--min-top1", 0, 0), ("--min-top1", 101, 6), ("--min-agreement", 101, 6), ("--max-kl", 0, 6), ("--max-kl", 1000, 0)],
)
def test_gates(session: Path, gate: str, limit: float, code: int):
    done = vitq("evaluate", "vitq-run/model.onnx", "--images", "images", "--json", gate, limit, folder=session)
    assert done.code == code
    assert "kl" in done.document  # the results are printed first
    assert (f"{gate} {limit}" in done.err) == (code == 6)
    assert (session / "vitq-run" / "evaluate.json").exists()


def test_a_gate_that_cannot_be_measured_is_a_usage_error(session: Path):
    shutil.move(session / "vitq-run" / "model.onnx", session / "alone.onnx")
    done = vitq("evaluate", "alone.onnx", "--images", "images", "--max-kl", 1, folder=session)
    assert (done.code, done.out) == (2, "")
    assert "give it with --reference" in done.err


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (("profile", "model", "--images", "images", "--num-images", 8, "--bits", "3,8"), {"layers", "macs", "num_images", "seconds"}),
        (
            ("allocate", "--budget", "like=4"),
            {"average_weight_bits", "average_activation_bits_all", "size_bytes", "bops", "objective", "bound", "gap", "solve_seconds"},
        ),
        (("calibrate", "--num-images", 8), {"output", "recipe", "file_bytes", "num_images"}),
        (
            ("export", "--num-images", 4, "--storage", "fast"),
            {
                "file_bytes", "planned_weight_bytes", "weight_bytes", "quantized_layers", "integer_candidates", "integer_kernels",
                "float_by_choice", "top1_agreement", "code_mismatch", "seconds",
            },
        ),
        (("show", "vitq-run/plan.json"), {"layers", "architecture"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_json_is_one_document_and_nothing_else(session: Path, arguments: tuple[object, ...], fields: set[str]):
    done = vitq(*arguments, "--json", "--force", folder=session)
    assert done.code == 0, done.err
    assert fields <= set(done.document)  # json.loads takes no second document
    assert "next:" not in done.err


def test_calibrate_and_show_tell_what_each_layer_costs(session: Path):
    done = vitq("calibrate", "--json", "--force", "-o", "again.safetensors", folder=session)
    layers = done.document["layers"]
    assert done.document["predicted_kl"] == pytest.approx(sum(error["kl"] for error in layers.values()))
    shown = vitq("show", "again.safetensors", "--json", folder=session).document["layers"]
    assert {row["name"]: {"sqnr": row["sqnr"], "kl": row["kl"]} for row in shown} == layers
    text = vitq("show", "again.safetensors", folder=session).out
    assert "SQNR dB" in text and max(map(len, text.splitlines())) <= 80


def test_stdout_of_a_process_is_pure(session: Path):
    """Libraries that write past sys.stdout would show here."""
    for arguments, key in (
        (["allocate", "--budget", "4.0", "-o", "other.json"], "objective"),
        (["export", "--num-images", "4"], "integer_kernels"),
    ):
        command = [sys.executable, "-m", "vitq", *arguments, "--json", "--force"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=session, env=environment(), timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)[key] > 0
        assert "\x1b" not in done.stdout + done.stderr


def test_quiet_says_the_result_only(session: Path):
    done = vitq("allocate", "--uniform", "4", "--force", "-q", folder=session)
    assert (done.code, done.err) == (0, "")
    assert "wrote vitq-run" in done.out


def test_uniform_and_fixed_reach_the_plan(session: Path):
    assert vitq("allocate", "--uniform", "4/6", "--fixed", "blocks.0.*=8", "--force", folder=session).code == 0
    bits = {entry.name: (entry.weight_bits, entry.activation_bits) for entry in load_plan(session / "vitq-run" / "plan.json").layers}
    assert bits["blocks.0.mlp.fc1"] == bits["head"] == (8, 8)
    assert bits["blocks.1.mlp.fc1"] == (4, 6)
    assert bits["blocks.1.attn.qk"] == (None, 6)


@pytest.mark.parametrize(("budget", "forced"), [("2.0", True), ("2.5", False)])
def test_a_budget_that_leaves_no_choice_says_so(session: Path, tmp_path: Path, budget: str, forced: bool):
    done = vitq("allocate", "--budget", budget, "--bits", "2,3,4", "-o", tmp_path / "plan.json", folder=session)
    said = "the budget leaves no choice: every searched layer gets 2 bits, the fewest; more than that is a choice" in done.err
    assert done.code == 0 and said == forced


@pytest.mark.parametrize(("budget", "loose"), [("9", True), ("size=1GB", True), ("7.5", False)])
def test_a_budget_above_all_that_can_be_bought_says_so(session: Path, tmp_path: Path, budget: str, loose: bool):
    done = vitq("allocate", "--budget", budget, "-o", tmp_path / "plan.json", folder=session)
    said = "the budget does not bind: every searched layer gets 8 bits, the most; less than that is a choice" in done.err
    assert done.code == 0 and said == loose


def test_an_artifact_by_path_makes_its_folder_the_run_folder(session: Path):
    (session / "other").mkdir()
    shutil.copy(session / "vitq-run" / "profile.json", session / "other" / "profile.json")
    done = vitq("allocate", "other/profile.json", "--budget", "5", folder=session)
    assert "next: vitq calibrate --run-dir other" in done.err
    assert vitq("calibrate", "--run-dir", "other", folder=session).code == 0
    assert (session / "other" / "model.safetensors").exists()


def test_relative_sources_are_tried_from_the_artifacts_folder(session: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("profile.json", "plan.json"):
        shutil.copy(session / "vitq-run" / name, session / name)
    done = vitq("calibrate", session / "plan.json", folder=elsewhere)
    assert done.code == 0, done.err
    make_model(elsewhere / "model", seed=9)  # another one of that name is not taken for it
    make_images(elsewhere / "images", seed=9)
    done = vitq("export", "--run-dir", session, "-o", "here.onnx", folder=elsewhere)
    assert done.code == 0, done.err
    assert sorted(path.name for path in elsewhere.iterdir()) == ["here.onnx", "images", "model"]


def test_a_backbone_from_a_weights_file_alone(session: Path):
    """What the file does not say is given as options once, and remembered."""
    shutil.copy(session / "model" / "model.safetensors", session / "weights.safetensors")
    sizes = ["img_size=32", "patch_size=8", "embed_dim=64", "depth=2", "num_heads=2"]
    described = ["--arch", "vit_tiny_patch16_224", "--num-classes", 0, *(part for size in sizes for part in ("--model-kwargs", size))]
    done = vitq("profile", "weights.safetensors", *described, "--images", "images", "--run-dir", "r", "--bits", "4,8", folder=session)
    assert done.code == 0, done.err
    for command in (("allocate", "--uniform", "8"), ("calibrate",), ("export",)):
        done = vitq(*command, "--run-dir", "r", folder=session)
        assert done.code == 0, done.err
    found = vitq("evaluate", "r/model.onnx", "--images", "images", "--json", folder=session).document
    assert set(found) == {"num_images", "digest", "cosine", "cosine_margin", "relative_error", "relative_error_margin"}
    assert found["cosine"] > 0.99


def test_a_plan_by_hand_takes_the_sources_of_the_profile_beside_it(session: Path):
    path = session / "vitq-run" / "plan.json"
    plan = json.loads(path.read_text())
    for entry in plan["layers"]:
        entry["activation_bits"] = 8
    del plan["made_from"], plan["summary"]
    path.write_text(json.dumps(plan))
    assert vitq("calibrate", "--force", folder=session).code == 0
    assert vitq("export", "--force", folder=session).code == 0


def test_skipped_images_are_named(session: Path):
    (session / "images" / "class1" / "broken.png").write_bytes(b"no picture")
    done = vitq("evaluate", "vitq-run/model.onnx", "--images", "images", folder=session)
    assert done.code == 0
    assert "skipped 1 of 41 images" in done.err and "class1/broken.png: no image" in done.err


@pytest.mark.parametrize(
    "artifact", ["model", "vitq-run/profile.json", "vitq-run/plan.json", "vitq-run/model.safetensors", "vitq-run/model.onnx"]
)
def test_show(session: Path, artifact: str):
    done = vitq("show", artifact, folder=session)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    assert max(len(line) for line in done.out.splitlines()) <= 80
    names = [layer.name for layer in load_profile(session / "vitq-run" / "profile.json").layers]
    assert all(name in done.out for name in names)
    found = vitq("show", artifact, "--json", folder=session).document
    assert [row["name"] for row in found["layers"]] == names
    layer = next(row for row in found["layers"] if row["name"] == "blocks.1.mlp.fc1")
    assert (layer["type"], layer["block"], layer["parameters"], layer["macs"]) == ("fc1", "blocks.1", 64 * 256, 17 * 64 * 256)
    assert [operand["role"] for operand in layer["operands"]] == ["post_layernorm", "weight"]
    if "plan" in artifact or "model." in artifact:
        assert {layer["weight_bits"], layer["activation_bits"]} <= {2, 3, 4, 5, 6, 7, 8}
        assert f"{layer['weight_bits']}/{layer['activation_bits']}" in done.out


def test_show_a_staircase(session: Path):
    assert vitq("allocate", "--pareto", "stairs.json", "--bits", "3,4", folder=session).code == 0
    done = vitq("show", "stairs.json", folder=session)
    assert done.code == 0, done.err
    written = json.loads((session / "stairs.json").read_text())
    rows = [line.split() for line in done.out.splitlines()[2:]]
    assert [row[0] for row in rows if row[0] != "uniform"] == [f"{plan['budget']:g}" for plan in written["plans"]]
    assert rows[-1][:4] == ["uniform", "4", "4.00", "4.00"] and f"{written['uniform'][-1]['objective']:.4g}" in rows[-1]
    shown = vitq("show", "stairs.json", "--json", folder=session).document
    assert shown["plans"] == written["plans"] and shown["kind"] == "staircase"
    (session / "stairs.json").write_text(json.dumps(written | {"plans": [{}]}))
    refused = vitq("show", "stairs.json", folder=session)
    assert refused.code == 3 and "plans.0.budget" in refused.err and "`vitq allocate --pareto FILE`" in refused.err


def test_show_a_run_folder_says_what_is_stale(session: Path):
    def stale() -> dict[str, str | None]:
        return {row["file"]: row["stale"] for row in vitq("show", "vitq-run", "--json", folder=session).document["files"]}

    assert stale() == dict.fromkeys(("profile.json", "plan.json", "model.safetensors", "model.onnx"))
    assert vitq("allocate", "--budget", "5", "--force", folder=session).code == 0
    found = stale()
    assert found["model.safetensors"] == "calibrated to another plan.json than the one beside it; run `vitq calibrate --force` again"
    assert found["plan.json"] is None and found["model.onnx"] is None, "the file is still that of the model beside it"
    assert "model.safetensors was calibrated to another plan.json" in " ".join(vitq("show", "vitq-run", folder=session).out.split())
    assert vitq("calibrate", "--force", "--num-images", 8, folder=session).code == 0
    assert stale() == dict.fromkeys(found) | {
        "model.onnx": "exported from another model.safetensors than the one beside it; run `vitq export --force` again"
    }
    assert vitq("profile", "model", "--images", "images", "--num-images", 8, "--bits", "4,8", "--force", folder=session).code == 0
    found = stale()
    assert found["plan.json"] == "made from another profile.json than the one beside it; run `vitq allocate --budget 5 --force` again"
    assert "another profile.json" in str(found["model.safetensors"])


def test_show_computes_the_sums_of_an_edited_plan(session: Path):
    path = session / "vitq-run" / "plan.json"
    plan = json.loads(path.read_text())
    for entry in plan["layers"]:
        if entry["name"] not in plan["fixed"]:
            entry |= {"weight_bits": entry["weight_bits"] and 5, "activation_bits": 6}
    path.write_text(json.dumps(plan))
    found = vitq("show", "vitq-run/plan.json", "--json", folder=session).document["summary"]
    assert (found["average_weight_bits"], found["average_activation_bits"]) == (5, 6)
    uniform = vitq("allocate", "--uniform", "5/6", "--json", "--force", folder=session).document
    assert (found["size_bytes"], found["bops"]) == (uniform["size_bytes"], uniform["bops"])
    assert "average bits: 5.000 weights, 6.000 activations" in vitq("show", "vitq-run/plan.json", folder=session).out


def test_show_writes_its_document(session: Path):
    done = vitq("show", "model", "-o", "layers.json", folder=session)
    assert done.code == 0
    assert len(json.loads((session / "layers.json").read_text())["layers"]) == 2 * 6 + 2
    assert json.loads((session / "layers.json").read_text())["num_classes"] == CLASSES


def test_the_python_functions_take_paths_as_text_too(session: Path):
    model = vitq_package.load(str(session / "model"))
    assert load_profile(str(session / "vitq-run" / "profile.json")).layers
    plan = load_plan(str(session / "vitq-run" / "plan.json"))
    save(plan, str(session / "again.json"))
    assert load_plan(session / "again.json") == plan
    images = open_images(str(session / "images"), model.data_config, 8, class_names=model.label_names)
    calibrated = checkpoint.load(str(session / "vitq-run" / "model.safetensors"))
    checkpoint.save(calibrated, str(session / "again.safetensors"))
    assert checkpoint.is_checkpoint(str(session / "again.safetensors"))
    file = str(session / "again.onnx")
    vitq_package.export(calibrated, file, (batch for batch, _ in images))
    assert onnx_metadata(file)["vitq.num_classes"] == CLASSES
    batch = next(iter(images))[0]
    assert onnx_runnable(file)(batch).shape == (8, CLASSES)
    assert read_image(str(next((session / "images").rglob("*.png"))), model.data_config).shape == batch.shape[1:]
    with pytest.raises(UsageError, match="again.onnx exists already"):
        vitq_package.export(calibrated, file, [])


def test_the_demo_proposes_to_look_at_its_report(tmp_path: Path):
    *command, address = shlex.split(looking_at(tmp_path / "a ö" / "report.html"))
    assert command == ["python3", "-m", "webbrowser"]
    assert address.startswith("file:///") and url2pathname(urlsplit(address).path) == str(tmp_path / "a ö" / "report.html")


def test_a_demo_that_was_ended_begins_anew_without_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def killed(model: str) -> None:
        asked.append(model)
        raise KeyboardInterrupt

    monkeypatch.setattr("vitq.models.load", killed)
    assert vitq("demo", folder=tmp_path).code == 130
    (tmp_path / "vitq-demo" / "plan.json").write_text("half of it")
    assert vitq("demo", folder=tmp_path).code == 130 and len(asked) == 2
    (mark,) = (tmp_path / "vitq-demo").glob(".*")
    with locked(mark):
        at_work = vitq("demo", folder=tmp_path)
    assert at_work.code == 2 and "another demo is at work in vitq-demo" in at_work.err
    mark.unlink()  # as a finished demo leaves it, or somebody's own folder
    refused = vitq("demo", folder=tmp_path)
    assert refused.code == 2 and "vitq-demo exists already; give --force" in refused.err and len(asked) == 2
    monkeypatch.setattr("vitq.cli.demo._make", lambda folder, terminal: (folder / "report.html").touch())
    assert vitq("demo", "--force", folder=tmp_path).code == 0
    assert {path.name for path in (tmp_path / "vitq-demo").iterdir()} == {"plan.json", "report.html"}


@pytest.mark.slow
def test_demo(tmp_path: Path):
    done = vitq("demo", "--json", folder=tmp_path)
    assert done.code == 0, done.err
    rows = {row["name"]: row for row in done.document["results"]}
    assert list(rows) == ["float", "uniform 8", "uniform 3", "mixed 3.0"]
    assert all(row["num_images"] == 1000 and row["median_ms"] > 0 for row in rows.values())
    assert rows["mixed 3.0"]["kl"] < 0.6 * rows["uniform 3"]["kl"]
    assert rows["uniform 8"]["kl"] < rows["mixed 3.0"]["kl"]
    assert abs(rows["uniform 8"]["top1"] - rows["float"]["top1"]) < 1
    assert rows["mixed 3.0"]["file_bytes"] < 0.5 * rows["uniform 8"]["file_bytes"] < 0.2 * rows["float"]["file_bytes"]
    assert done.document["report"] == "vitq-demo/report.html"
    assert vitq("report", "vitq-demo", "--force", "--json", folder=tmp_path).document["left_out"] == []
    assert vitq("demo", folder=tmp_path).code == 2
    done = vitq("export", "--run-dir", "vitq-demo/uniform-3", "-o", "again.onnx", folder=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "vitq-demo" / "uniform-3" / "model.onnx").read_bytes()
