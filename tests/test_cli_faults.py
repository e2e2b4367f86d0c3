"""Bad input: the exit code, a message that says what to do, no traceback, and no file left behind."""

import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from cli_session import Done, environment, make_images, make_model, vitq

from vitq import checkpoint
from vitq.cli.app import main
from vitq.quantizers import AdaLog


def refused(session: Path, code: int, *arguments: object) -> str:
    """The message of a command that must fail with this code and leave every file as it was."""
    before = contents(session)
    done: Done = vitq(*arguments, folder=session)
    assert done.code == code, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert contents(session) == before
    return done.err


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def edit_plan(session: Path, **fields: object) -> None:
    """Changes fields of the plan's third layer."""
    path = session / "vitq-run" / "plan.json"
    plan = json.loads(path.read_text())
    plan["layers"][2] |= fields
    path.write_text(json.dumps(plan))


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("touched",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("profile", "gone", "--images", "images"), "'gone' is no file, folder or timm model"),
        (("profile", "gone.safetensors", "--images", "images"), "gone.safetensors does not exist; give a timm local folder"),
        (("profile", "model", "--images", "gone"), "gone does not exist; give a folder of images"),
        (("allocate", "--budget", "4"), "profile.json does not exist; `vitq profile MODEL --images PATH --run-dir new` writes it"),
        (("calibrate",), "plan.json does not exist; `vitq allocate --budget 4.0 --run-dir new` writes it"),
        (("export",), "model.safetensors does not exist; `vitq calibrate --run-dir new` writes it"),
        (("evaluate", "gone.onnx", "--images", "images"), "gone.onnx does not exist; `vitq export -o gone.onnx` writes it"),
        (("show", "gone.json"), "gone.json does not exist"),
        (("profile", "", "--images", "images"), "the name of the MODEL is empty; give a timm local folder"),
        (("profile", "model", "--images", ""), "the path of the images is empty; give a folder of images"),
        (("show", "images/class0/0.png"), "0.png is no MODEL and nothing that vitq wrote; give a timm local folder"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_missing_file(session: Path, arguments: tuple[str, ...], message: str):
    rest = ("--run-dir", "new") if arguments[0] != "evaluate" else ()
    assert message in refused(session, 3, *arguments, *rest)


@pytest.mark.parametrize("size", [0, 7, 1000, -1000])
def test_a_truncated_safetensors(session: Path, size: int):
    for path, command in (
        (session / "model" / "model.safetensors", ("profile", "model", "--images", "images", "--run-dir", "new")),
        (session / "vitq-run" / "model.safetensors", ("export", "--force")),
    ):
        path.write_bytes(path.read_bytes()[:size])
        assert "model.safetensors" in refused(session, 3, *command)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_in_it(session: Path, legacy: bool):
    torch.save({"model": Malicious()}, session / "model.pth", _use_new_zipfile_serialization=not legacy)
    message = refused(session, 3, "profile", "model.pth", "--arch", "vit_tiny_patch16_224", "--images", "images", "--run-dir", "new")
    assert "which was not run; save the model's state_dict()" in message


def test_a_plan_with_an_unknown_layer(session: Path):
    edit_plan(session, name="blocks.7.nothing")
    assert "names layer 'blocks.7.nothing', which the model does not have; `vitq show MODEL`" in refused(session, 3, "calibrate", "--force")


def test_a_plan_with_nine_bits(session: Path):
    edit_plan(session, activation_bits=9)
    message = refused(session, 3, "calibrate", "--force")
    assert "activation_bits" in message and "2, 3, 4, 5, 6, 7 or 8" in message and "9" in message


def test_a_budget_of_one(session: Path):
    message = refused(session, 4, "allocate", "--budget", "1.0", "--force")
    assert "budget '1.0' cannot be met" in message and "reachable are" in message and "2" in message


def test_images_without_images(session: Path):
    (session / "empty").mkdir()
    (session / "empty" / "notes.txt").write_text("nothing")
    for command in (("profile", "model", "--run-dir", "new"), ("calibrate", "--force"), ("export", "--force"), ("evaluate", "model")):
        assert "empty holds no images" in refused(session, 3, *command, "--images", "empty")


@pytest.mark.parametrize(
    "command",
    [
        ("profile", "model", "--images", "images"),
        ("allocate", "--budget", "4"),
        ("calibrate",),
        ("export",),
        ("export", "-o", "model/config.json"),
        ("show", "model", "-o", "vitq-run/plan.json"),
        ("evaluate", "model", "--images", "images", "-o", "vitq-run/plan.json"),
        ("demo", "--run-dir", "vitq-run"),
    ],
    ids=" ".join,
)
def test_an_output_that_exists(session: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    def unreached(*_: object, **__: object) -> None:
        raise AssertionError("something expensive was begun")

    monkeypatch.setattr("vitq.models.load", unreached)
    monkeypatch.setattr("vitq.checkpoint.load", unreached)
    message = refused(session, 2, *command)
    assert "exists already; give --force to replace" in message


@pytest.mark.parametrize(
    ("command", "gone"),
    [
        (("profile", "gone", "--images", "images"), "'gone' is no file"),
        (("profile", "model", "--images", "gone"), "gone does not exist; give a folder of images"),
        (("allocate", "gone.json", "--budget", "4", "-o", "vitq-run/plan.json"), "gone.json does not exist"),
        (
            ("calibrate", "gone.json", "-o", "vitq-run/plan.json"),
            "gone.json does not exist; `vitq allocate --budget 4.0 -o gone.json` writes it",
        ),
        (("calibrate", "--images", "gone"), "gone does not exist; give a folder of images"),
        (("calibrate", "--model", "gone/model"), "gone/model does not exist; give a timm local folder"),
        (
            ("export", "gone.safetensors", "-o", "vitq-run/model.onnx"),
            "gone.safetensors does not exist; `vitq calibrate -o gone.safetensors` writes it",
        ),
        (("export", "--images", "gone"), "gone does not exist; give a folder of images"),
        (
            ("evaluate", "gone.onnx", "--images", "images", "-o", "vitq-run/plan.json"),
            "gone.onnx does not exist; `vitq export -o gone.onnx` w",
        ),
        (("evaluate", "model", "--images", "gone", "-o", "vitq-run/plan.json"), "gone does not exist; give a folder of images"),
        (("show", "gone.json", "-o", "vitq-run/plan.json"), "gone.json does not exist"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_missing_input_is_said_before_an_output_that_exists(session: Path, command: tuple[str, ...], gone: str):
    assert gone in refused(session, 3, *command)


def test_commands_that_are_proposed_can_be_pasted(session: Path, tmp_path: Path):
    folder = tmp_path / "r ö 2"
    shutil.copytree(session / "vitq-run", folder)
    for command in (("allocate", "--budget", "4", "--force"), ("evaluate", folder / "model.onnx", "--verify")):
        said = vitq(*command, *(("--run-dir", folder) if command[0] == "allocate" else ()), folder=session)
        proposed = shlex.split(said.err.rpartition("next: ")[2])
        assert said.code == 0 and any(Path(word) in (folder, folder / "model.onnx") for word in proposed), said.err


def test_what_is_proposed_where_its_output_exists_has_force(session: Path):
    (session / "vitq-run").rename(session / "r 2")
    for command in (
        ("allocate", "--pareto", "stairs.json", "--bits", "3,4"),
        ("allocate", "--budget", "4", "--force"),
    ):
        said = vitq(*command, "--run-dir", "r 2", folder=session)
        assert said.code == 0, said.err
        proposed = shlex.split(said.err.rpartition("next: ")[2])
        assert proposed[-3:] == ["--force", "--run-dir", "r 2"]
    (session / "r 2" / "plan.json").unlink()
    assert "--force" not in vitq("show", "r 2/profile.json", folder=session).err


@pytest.mark.parametrize(
    ("name", "command", "again"),
    [
        ("profile.json", ("allocate", "--budget", "4", "--force"), "vitq profile MODEL --images PATH --force --run-dir 'r 2'"),
        ("plan.json", ("calibrate", "--force"), "vitq allocate --budget 4.0 --force --run-dir 'r 2'"),
        ("model.safetensors", ("export", "--force"), "vitq calibrate --force --run-dir 'r 2'"),
        ("model.onnx", ("bench",), "vitq export --force --run-dir 'r 2'"),
        ("latency.json", ("allocate", "--budget", "latency=4ms", "--force"), "vitq bench --layers --run-dir 'r 2'"),
        ("bench.json", ("report", "--force"), "vitq bench --run-dir 'r 2'"),
        ("evaluate.json", ("report", "--force"), "vitq evaluate 'r 2/model.onnx' --images PATH"),
    ],
)
def test_a_damaged_file_names_the_command_that_makes_it_again_there(session: Path, name: str, command: tuple[str, ...], again: str):
    (session / "vitq-run").rename(session / "r 2")
    (session / "r 2" / name).write_text("{")
    assert f"`{again}`" in refused(session, 3, *command, "--run-dir", "r 2")
    (session / "r 2" / name).unlink()
    if "report" not in command:
        assert f"`{again.replace(' --force', '')}` writes it" in refused(session, 3, *command, "--run-dir", "r 2")


@pytest.mark.parametrize("content", ["{", "{}", '{"format": "other/1"}'])
def test_show_names_the_command_that_makes_a_damaged_file(session: Path, content: str):
    commands = {"plan.json": "vitq allocate --budget 4.0 --force", "latency.json": "vitq bench --layers", "bench.json": "vitq bench"}
    commands |= {"profile.json": "vitq profile MODEL --images PATH --force", "staircase.json": "vitq allocate --pareto FILE"}
    for name, command in commands.items():
        (session / "vitq-run" / name).write_text(content)
        assert f"`{command}`" in refused(session, 3, "show", f"vitq-run/{name}")
    (session / "notes.json").write_text(content)
    message = refused(session, 3, "show", "notes.json")
    assert "give a profile, a plan, a staircase" in message and "vitq profile" not in message
    assert "`vitq allocate --budget 4.0 -o new/plan.json`" not in refused(session, 3, "show", "new/plan.json")
    assert "`vitq allocate --budget 4.0 --run-dir new` writes it" in refused(session, 3, "show", "new/plan.json")


def test_a_missing_file_of_the_usual_folder_says_how_to_name_another(session: Path):
    (session / "vitq-run" / "plan.json").unlink()
    message = refused(session, 3, "calibrate", "--force")
    assert "vitq-run/plan.json does not exist; `vitq allocate --budget 4.0` writes it, and --run-dir names another run folder" in message


def test_a_run_folder_that_is_to_be_quoted(session: Path):
    message = refused(session, 3, "finetune", "--images", "images", "--run-dir", "a b")
    assert "does not exist; `vitq allocate --budget 4.0 --run-dir 'a b'` writes it" in message


def test_a_terminal_that_cannot_show_a_letter_gets_its_code(session: Path):
    bytes_out = io.BytesIO()
    out = io.TextIOWrapper(bytes_out, encoding="ascii", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.chdir(session), pytest.raises(SystemExit) as ended:
        main(["evaluate", "vitq-run/model.onnx", "--images", "images", "--num-images", "8"])
    assert not ended.value.code and b"\\xb1" in bytes_out.getvalue()


def test_folders_of_another_number_than_the_classes_are_no_labels(session: Path, tmp_path: Path):
    shutil.copytree(session / "images", tmp_path / "images")
    shutil.rmtree(min((tmp_path / "images").iterdir()))
    model = make_model(tmp_path / "named")
    config = json.loads((model / "config.json").read_text())
    config.pop("label_names", None)
    (model / "config.json").write_text(json.dumps(config))
    command = ("profile", model, "--images", tmp_path / "images", "--metric", "lrp", "--lrp-target", "label", "-o", tmp_path / "p.json")
    assert "label" in refused(session, 3, *command)
    said = vitq("evaluate", model, "--images", tmp_path / "images", folder=session)
    assert said.code == 0 and "top-1" not in said.out and "nothing is measured" in said.err


def test_averages_of_no_layer_are_said_to_be(session: Path):
    done = vitq("allocate", "--budget", "4", "--fixed", "*=8", "-o", "all.json", folder=session)
    assert done.code == 0 and "every layer is fixed, so there was nothing to buy" in done.err


def test_an_output_that_is_a_folder(session: Path):
    assert "is a folder; give -o a file" in refused(session, 2, "allocate", "--budget", "4", "--force", "-o", "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("allocate", "--force"), "neither a budget nor a uniform width was given"),
        (("allocate", "--force", "--budget", "much"), "'much'"),
        (("allocate", "--force", "--uniform", "9"), "whole bits from 2 to 8"),
        (("allocate", "--force", "--budget", "4", "--bits", "2;3"), "widths from 2 to 8 with commas"),
        (("allocate", "--force", "--budget", "4", "--metric", "hawq"), "metric 'hawq' is not in the profile"),
        (("profile", "model", "--images", "images", "--force", "--bits", "4,9"), "2 to 8"),
        (
            ("profile", "model", "--images", "images", "--force", "--metric", "luck"),
            "metric 'luck' is not known; give one of output-fisher",
        ),
        (("profile", "model", "--images", "images", "--force", "--model-kwargs", "depth"), "give key=value"),
        (
            ("profile", "model", "--images", "images", "--force", "--device", "abacus"),
            "--device 'abacus' cannot be used here; give cpu, or, where there is a GPU, cuda or cuda:N\n",
        ),
        (("finetune", "--images", "images", "--aa", "rand-x9"), "--aa 'rand-x9' is no policy of timm's; give rand-m9-mstd0.5 or the like"),
        (("finetune", "--images", "images", "--aa", "rand-mX"), "--aa 'rand-mX' is no policy of timm's; give rand-m9-mstd0.5 or the like"),
        (("finetune", "--images", "images", "--aa", "rand-m9-n"), "--aa 'rand-m9-n' is no policy of timm's"),
        (("calibrate", "--force", "--recipe", "soup"), "recipe 'soup' is not known; give one of fast"),
        (("export", "--force", "--storage", "attic"), "storage 'attic' is not known; give one of packed"),
        (("export", "--force", "--opset", 20), "--opset"),
        (("export", "--force", "--batch", "many"), "--batch 'many' is not known; give dynamic or a number of images"),
        (("export", "--force", "--batch", "0"), "--batch '0' is not known; give dynamic or a number of images"),
        (("export", "--force", "-o", "model.txt"), "give a name that ends in .onnx"),
        (("profile", "model", "--images", "images", "--budget", "2.5"), "--budget is no option of `vitq profile` but of `vitq allocate`"),
        (
            ("calibrate", "--batch", "4"),
            "--batch is no option of `vitq calibrate` (did you mean --batch-size?) but of `vitq export` and `v",
        ),
        (("profile", "model", "--images", "images", "--force", "--metric", "sqnr", "--pairs"), "--pairs is for --metric output-fisher"),
        (("allocate", "--force", "--budget", "4", "--held-out", "9"), "--held-out would change nothing: plans are measured by --audit N"),
        (("allocate", "--force", "--uniform", "4", "--images", "images"), "--images would change nothing"),
        (("allocate", "2.5"), "2.5 is no profile; if it is a budget, type `vitq allocate --budget 2.5`"),
        (("allocate", "4.0/8.0", "--force"), "type `vitq allocate --budget 4.0/8.0`"),
        (("allocate", "size=3.2MB"), "type `vitq allocate --budget size=3.2MB`"),
        (("evaluate", "model"), "--images"),
        (("bake",), "bake"),
        (("profile", "model", "--images", "images", "--num-images", "0"), "--num-images"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_usage_errors(session: Path, arguments: tuple[str, ...], message: str):
    assert message in refused(session, 2, *arguments)


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        ("vitq-run/plan.json", "is not a vitq-profile/1 file (found 'vitq-plan/1')"),
        ("model/config.json", "is not a vitq-profile/1 file"),
        ("vitq-run/model.onnx", "is no JSON but another kind of file"),
    ],
)
def test_a_file_of_another_kind(session: Path, artifact: str, message: str):
    assert message in refused(session, 3, "allocate", artifact, "--budget", "4", "-o", "new.json")
    shutil.copy(session / "model" / "model.safetensors", session / "float.safetensors")
    assert "is not a calibrated model" in refused(session, 3, "export", "float.safetensors", "-o", "new.onnx")
    assert "vitq-checkpoint/1 file" in refused(session, 3, "profile", "vitq-run/model.safetensors", "--images", "images", "-o", "new.json")


@pytest.mark.parametrize(
    ("name", "option", "command"),
    [
        ("model", "--model", ("calibrate", "--force")),
        ("images", "--images", ("calibrate", "--force")),
        ("images", "--images", ("export", "--force")),
        ("model", "--reference", ("evaluate", "vitq-run/model.onnx", "--images", "images")),
    ],
    ids=["calibrate model", "calibrate images", "export images", "evaluate model"],
)
def test_a_source_that_is_gone_or_changed(session: Path, name: str, option: str, command: tuple[str, ...]):
    shutil.move(session / name, session / "moved")
    if name == "model" or command[0] != "evaluate":
        message = refused(session, 3, *command)
        assert name in message and f"{option}" in message and "`vitq profile MODEL --images PATH --force` again" in message
        done = vitq(*command, option, "moved", folder=session)
        assert done.code == 0, done.err
    make = make_model if name == "model" else make_images
    make(session / name, seed=7)
    message = refused(session, 3, *command)
    assert "have changed" in message and option in message and "`vitq profile MODEL --images PATH --force` again" in message


def test_a_stale_chain(session: Path):
    make_model(session / "another", seed=3)
    assert vitq("profile", "another", "--images", "images", "--force", "--bits", "4,8", folder=session).code == 0
    message = refused(session, 3, "calibrate", "--force")
    assert "was made from another profile" in message and "`vitq allocate --budget 4.0 --force` again" in message
    assert vitq("allocate", "--budget", "5", "--force", folder=session).code == 0
    message = refused(session, 3, "export", "--force")
    assert "calibrated to another plan" in message and "`vitq calibrate --force` again" in message
    assert vitq("export", "vitq-run/model.safetensors", "-o", "older.onnx", folder=session).code == 0  # asked for by its path
    message = refused(session, 3, "calibrate", "--force", "--model", "images")
    assert "config.json" in message


def test_a_plan_for_another_model(session: Path):
    make_model(session / "bigger", classes=9)
    message = refused(session, 3, "calibrate", "--force", "--model", "bigger")
    assert "run `vitq profile` again" in message or "do not fit" in message or "differs" in message


def test_a_damaged_memory(session: Path):
    path = session / "vitq-run" / "plan.json"
    plan = json.loads(path.read_text())
    plan["made_from"]["model"] = {"source": 3}
    path.write_text(json.dumps(plan))
    assert "made_from.model" in refused(session, 3, "calibrate", "--force")


def test_quantizers_that_are_not_exported_are_refused_before_anything_is_traced(session: Path, monkeypatch: pytest.MonkeyPatch):
    path = session / "vitq-run" / "model.safetensors"
    found = checkpoint.load(path)
    first = next(iter(found.activations))
    other = AdaLog(2.0, 20, found.activations[first].bits)
    checkpoint.save(replace(found, activations=found.activations | {first: other}), path, force=True)

    def unreached(*_: object, **__: object) -> None:
        raise AssertionError("something expensive was begun")

    monkeypatch.setattr("vitq.onnx_file.trace_graph", unreached)
    monkeypatch.setattr("vitq.images.open_images", unreached)
    message = refused(session, 2, "export", "--force")
    assert f"the input {first} is quantized by AdaLog" in message and "`vitq calibrate --recipe fast --force`" in message


def test_a_foreign_onnx_file(session: Path):
    (session / "bad.onnx").write_bytes(b"no protobuf")
    assert "cannot be loaded by onnxruntime" in refused(session, 3, "evaluate", "bad.onnx", "--images", "images")


def test_an_interruption_is_130_and_leaves_nothing(session: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vitq.calibration.calibrate", interrupted)
    said = refused(session, 130, "calibrate", "--force")
    assert said.splitlines()[-1] == "vitq: interrupted; nothing half-written is left; the same command again begins anew"


def test_an_interrupted_sensitivity_says_that_it_goes_on(session: Path, monkeypatch: pytest.MonkeyPatch):
    metric = import_module("vitq.importance.sensitivity")  # the package's attribute is the function
    asked, losses = [], metric._per_image

    def interrupted(*arguments):
        asked.append(1)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return losses(*arguments)

    command = ("profile", "model", "--images", "images", "--num-images", 4, "--metric", "sensitivity", "--bits", "4", "--force")
    monkeypatch.setattr(metric, "_per_image", interrupted)
    stopped = vitq(*command, folder=session)
    journal = "vitq-run/.profile.journal.jsonl"
    assert stopped.code == 130 and f"kept in {journal}; the same command again goes on there" in stopped.err
    assert (session / journal).is_file()
    before = len(asked)
    assert vitq(*command, folder=session).code == 0 and not (session / journal).exists()
    again = len(asked) - before
    assert vitq(*command, "--no-resume", folder=session).code == 0
    assert again == len(asked) - before - again - 4  # four results were read, not computed


def test_a_fault_of_ours_is_a_traceback_and_1(session: Path):
    script = "import vitq.artifacts, vitq.cli.app as app\nvitq.artifacts.load_plan = None\napp.main(['show', 'vitq-run/plan.json'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=session, env=environment(), timeout=120)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "TypeError" in done.stderr


def test_help_is_quick_and_light():
    script = (
        "import sys\nfrom vitq.cli.app import main\n"
        "try: main(['--help'])\nexcept SystemExit: print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), timeout=60, check=True)
    assert "profile" in done.stdout and "demo" in done.stdout
    assert not {"torch", "timm", "onnx", "onnxruntime", "numpy"} & set(done.stderr.split())
