"""Bad days: full disks, folders that cannot be written to, two runs at once, weights and images at the edge, strange paths, no network."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cli_session import CLASSES, environment, make_images, make_model, vitq
from PIL import Image
from safetensors.torch import load_file, save_file

from vitq import open_images
from vitq.accuracy import onnx_runnable
from vitq.calibration.scratch import Scratch, discard
from vitq.cli.app import main
from vitq.errors import InputError
from vitq.importance.journal import Journal
from vitq.whole import unfinished

PYTHON = [sys.executable, "-m", "vitq"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# A full disk

WRITING = [
    (("profile", "model", "--images", "images", "--num-images", 8, "--bits", "4,8", "--force"), "profile.json"),
    (("allocate", "--budget", "4", "--force"), "plan.json"),
    (("calibrate", "--num-images", 8, "--force"), "model.safetensors"),
    (("export", "--num-images", 8, "--force"), "model.onnx"),
    (("evaluate", "vitq-run/model.onnx", "--images", "images", "--num-images", 8), "evaluate.json"),
    (("report", "--force"), "report.html"),
    (("synthesize", "model", "--num-images", 1, "--iterations", 1, "-o", "vitq-run/images.safetensors"), "images.safetensors"),
]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond a size, as on a disk that is full: the system refuses the write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("command", "name"), WRITING, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_a_write_that_the_system_refuses(session: Path, command: tuple[object, ...], name: str):
    before = files(session)
    with largest_file(100):
        done = vitq(*command, folder=session)
    assert done.code == 3 and "Traceback" not in done.err
    message = done.err.strip().splitlines()[-1]
    assert message.startswith("vitq: cannot write vitq-run/") and "File too large; allow larger files there, or" in message
    assert {path: content for path, content in files(session).items() if "scratch" not in path} == before, "nothing changed"


@pytest.mark.slow
def test_a_disk_that_is_full(session: Path):
    """On a file system of its own, where the runner may make one."""
    script = 'mount -t tmpfs -o size="$1" tmpfs small && shift && exec "$@"'
    (session / "small").mkdir()
    (session / "many").mkdir()
    if subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", "64k", "true"], cwd=session, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    for size, command in (
        ("64k", ("calibrate", "--num-images", "8", "-o", "small/model.safetensors")),
        ("64k", ("export", "--num-images", "8", "-o", "small/model.onnx")),
        ("300k", ("calibrate", "--recipe", "reconstruct", "--iterations", "1", "-o", "small/model.safetensors")),
    ):
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, "sh", size, *PYTHON, *command],
            cwd=session, env=environment(), capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("vitq: cannot write small/") and "No space left on device; make room there, or" in message


def test_stdout_that_is_full(session: Path):
    if not Path("/dev/full").is_char_device():
        pytest.skip("there is no /dev/full")
    errors = []
    for options in ((), ("--json",)):
        with Path("/dev/full").open("w") as full, pytest.raises(SystemExit) as ended:
            try:
                with contextlib.redirect_stdout(full), contextlib.redirect_stderr(open(os.devnull, "w")):  # noqa: PTH123
                    main(["show", str(session / "vitq-run" / "plan.json"), *options])
            finally:
                with contextlib.suppress(OSError):
                    full.close()
        errors.append(ended.value.code)
    assert errors == [3, 3]


def test_a_device_is_not_replaced(session: Path):
    os.mkfifo(session / "pipe.json")
    done = vitq("allocate", "--budget", "4", "--force", "-o", "pipe.json", folder=session)
    assert done.code == 2 and "pipe.json is a device or a pipe, which is not replaced; give -o a file to write" in done.err
    assert (session / "pipe.json").is_fifo()


# Folders that cannot be written to


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of somebody whom permissions stop, in which this process is that somebody; root is stopped by none."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        if root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_to(finished: Path, nobody: Path):
    run = nobody / "vitq-run"
    run.mkdir()
    for name in ("profile.json", "plan.json"):
        (run / name).write_bytes(finished_copy := PLAIN[name])
        assert finished_copy
    run.chmod(0o555)
    done = vitq("allocate", "--budget", "5", "--force", folder=nobody)
    assert done.code == 3 and "cannot write vitq-run/plan.json: Permission denied; change who may read and write there, or" in done.err
    done = vitq("allocate", "--budget", "5", "-o", "deeper/plan.json", folder=run)
    assert done.code == 3 and "profile.json does not exist" in done.err
    (run / "plan.json").chmod(0)
    done = vitq("show", "vitq-run/plan.json", folder=nobody)
    assert done.code == 3 and "Permission denied" in done.err
    (run / "plan.json").chmod(0o644)
    assert sorted(path.name for path in run.iterdir()) == ["plan.json", "profile.json"]


PLAIN: dict[str, bytes] = {}


@pytest.fixture(autouse=True, scope="module")
def plain(finished: Path) -> None:
    """What somebody may not read where it lies."""
    PLAIN.update({name: (finished / "vitq-run" / name).read_bytes() for name in ("profile.json", "plan.json")})


@pytest.mark.parametrize("command", [command for command, _ in WRITING if command[0] != "evaluate"], ids=lambda command: command[0])
def test_a_file_where_a_folder_is_needed(session: Path, command: tuple[object, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vitq.models.load", None)  # nothing long is begun
    monkeypatch.setattr("vitq.checkpoint.load", None)
    rest = command[: command.index("-o")] if "-o" in command else command
    done = vitq(*rest, "-o", "model/config.json/out.safetensors", folder=session)
    assert done.code == 3
    assert (
        "cannot write model/config.json/out.safetensors: there is a file where a folder is needed; give a path through folders" in done.err
    )


# Two runs at once


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_makes_is_not(tmp_path: Path):
    path = tmp_path / "plan.json"
    (tmp_path / ".plan.json.aaaaaaaa.part").write_text("left")
    (tmp_path / ".plan.json.bbbbbbbb.part").mkdir()
    (tmp_path / ".plan.json.bbbbbbbb.part" / "model.onnx").write_text("left")
    (tmp_path / ".plan.jsonx.part").write_text("another's")
    (tmp_path / ".plan.journal.jsonl").write_text("kept")
    with unfinished(path) as first, unfinished(path, folder=True) as second:
        assert first.is_file() and second.is_dir()
        with unfinished(path) as third:
            assert sorted(tmp_path.iterdir()) == sorted(
                [first, second, third, tmp_path / ".plan.jsonx.part", tmp_path / ".plan.journal.jsonl"]
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".plan.journal.jsonl", ".plan.jsonx.part"]


def test_one_run_at_a_time_in_a_scratch_folder_or_a_journal(tmp_path: Path):
    with Scratch(tmp_path / "scratch", "x") as scratch:
        scratch.keep("block", {"x": torch.ones(1)})
        with pytest.raises(InputError, match="another run calibrates in .*scratch; wait until it has ended, or give another --run-dir"):
            Scratch(tmp_path / "scratch", "y")
        discard(tmp_path / "scratch")
        assert scratch.kept("block") is not None
    discard(tmp_path / "scratch")
    discard(tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()
    with (
        Journal(tmp_path / "journal", {"of": 1}),
        pytest.raises(InputError, match="another run writes .*journal; wait until it has ended, or give another --run-dir"),
    ):
        Journal(tmp_path / "journal", {"of": 1})
    with Journal(tmp_path / "journal", {"of": 1}) as journal:
        assert journal.result({"a": 1}, lambda: [1.0]) == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("commands", "refused"),
    [
        ([("profile", "model", "--images", "images", "--num-images", "16", "--force")] * 2, None),
        ([("calibrate", "--recipe", "reconstruct", "--iterations", "9", "--force")] * 2, "another run calibrates in"),
        ([("export", "--force")] * 2, None),
        ([("evaluate", f"vitq-run/{name}", "--images", "images") for name in ("model.onnx", "model.safetensors", "copy.onnx")], None),
    ],
    ids=["profile", "reconstruct", "export", "evaluate"],
)
def test_runs_at_once_in_one_folder(session: Path, commands: list[tuple[str, ...]], refused: str | None):
    shutil.copy(session / "vitq-run" / "model.onnx", session / "vitq-run" / "copy.onnx")
    runs = [
        subprocess.Popen([*PYTHON, *command], cwd=session, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    said = [run.communicate(timeout=300)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert codes.count(0) >= 1
    for code, text in zip(codes, said, strict=True):
        assert code == 0 or (code == 3 and refused is not None and refused in text), text
    if commands[0][0] == "evaluate":
        assert json.loads((session / "vitq-run" / "evaluate.json").read_text()).keys() == {"model.onnx", "model.safetensors", "copy.onnx"}
    assert not list(session.rglob(".*"))
    for command in (("allocate", "--budget", "4", "--force"), ("calibrate", "--force"), ("export", "--force")):
        done = vitq(*command, folder=session)
        assert done.code == 0, done.err


# Models and images at the edge


def change_weights(session: Path, **changes: object) -> None:
    path = session / "model" / "model.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        change(tensors[name.replace("__", ".")])  # pyright: ignore[reportCallIssue]
    save_file(tensors, path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, value: float):
    make_model(tmp_path / "model")
    make_images(tmp_path / "images")
    change_weights(tmp_path, blocks__1__mlp__fc2__weight=lambda tensor: tensor[3].fill_(value))
    for command in (("profile", "model", "--images", "images"), ("synthesize", "model"), ("evaluate", "model", "--images", "images")):
        done = vitq(*command, folder=tmp_path)
        assert done.code == 3 and "tensor blocks.1.mlp.fc2.weight holds NaN or infinity" in done.err
    assert not (tmp_path / "vitq-run").exists()


def chain(folder: Path, *profile: object) -> np.ndarray:
    """All four commands, every one of which must do; what the exported file gives for eight images."""
    commands = (("profile", "model", "--images", "images", *profile), ("allocate", "--budget", "4"), ("calibrate",), ("export",))
    for command in commands:
        done = vitq(*command, folder=folder)
        assert done.code == 0, done.err
    config = json.loads((folder / "vitq-run" / "plan.json").read_text())["model"]["data_config"]
    images = next(iter(open_images(folder / "images", config, 8)))[0]
    return onnx_runnable(folder / "vitq-run" / "model.onnx")(images).numpy()


@pytest.mark.slow
def test_channels_that_are_zero_or_constant(tmp_path: Path):
    make_model(tmp_path / "model")
    make_images(tmp_path / "images")
    for number in range(4):
        Image.new("RGB", (40, 36), (255 * (number % 2),) * 3).save(tmp_path / "images" / "class0" / f"flat{number}.png")

    def zero_rows(tensor: torch.Tensor) -> None:
        tensor[::3] = 0

    change_weights(
        tmp_path,
        patch_embed__proj__weight=zero_rows,
        blocks__0__norm1__weight=zero_rows,  # its outputs are constant there
        blocks__0__norm2__weight=torch.Tensor.zero_,
        blocks__0__attn__qkv__weight=zero_rows,
        blocks__0__mlp__fc1__weight=zero_rows,
        blocks__1__mlp__fc1__weight=torch.Tensor.zero_,
        blocks__1__mlp__fc1__bias=torch.Tensor.zero_,  # GELU's outputs are zero
        blocks__1__attn__proj__weight=torch.Tensor.zero_,
        head__weight=zero_rows,
    )
    outputs = chain(tmp_path, "--num-images", 24)
    assert outputs.shape == (8, CLASSES) and np.isfinite(outputs).all() and outputs.std() > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one image", "one class", "a batch larger than the set", "black images"])
def test_the_chain_at_the_edge(tmp_path: Path, case: str):
    make_model(tmp_path / "model", classes=1 if case == "one class" else CLASSES)
    make_images(tmp_path / "images")
    if case == "black images":
        for path in (tmp_path / "images").rglob("*.png"):
            Image.new("RGB", (40, 36)).save(path)
    options = {"one image": ("--num-images", 1), "a batch larger than the set": ("--batch-size", 1000)}
    outputs = chain(tmp_path, *options.get(case, ("--num-images", 16)))
    assert outputs.shape == (8, 1 if case == "one class" else CLASSES) and np.isfinite(outputs).all()
    for command in (("evaluate", "vitq-run/model.onnx", "--images", "images", "--json"), ("report",)):
        done = vitq(*command, folder=tmp_path)
        assert done.code == 0, done.err


# Paths

STRANGE = ["mit Leerzeichen", "Übergröße 漢字 🎉", "100%s %d{x}", "line\nbreak", "-v", "'\"$(touch x);", "a" * 255, "é" * 127, "#[*?]"]


@pytest.mark.parametrize("name", STRANGE, ids=ascii)
def test_strange_names(finished: Path, tmp_path: Path, name: str):
    (tmp_path / name).mkdir()
    run = shutil.copytree(finished / "vitq-run", tmp_path / name / name)
    for command in (("show", run / "plan.json"), ("allocate", "--run-dir", run, "--budget", "5", "--force"), ("show", run)):
        done = vitq(*command, folder=tmp_path / name)
        assert done.code == 0, done.err
    written = tmp_path / name / (name[: 255 - 5] + ".json" if name.isascii() else name[:100] + ".json")
    assert vitq("allocate", run / "profile.json", "--budget", "5", f"--output={written}", folder=tmp_path).code == 0
    assert sorted(path.name for path in written.parent.iterdir()) == sorted([name, written.name])


@pytest.mark.slow
def test_the_chain_under_strange_names(tmp_path: Path):
    folder = tmp_path / "line\nbreak" / "100%s {x}" / "Übergröße 漢字"
    make_model(folder / "model")
    make_images(folder / "images")
    assert np.isfinite(chain(folder, "--num-images", 16)).all()
    for command in (("evaluate", "vitq-run/model.onnx", "--images", "images"), ("bench", "--rounds", 1), ("report",)):
        done = vitq(*command, folder=folder)
        assert done.code == 0, done.err


@pytest.mark.parametrize(
    "command",
    [
        ("profile", "PATH", "--images", "images"),
        ("profile", "model", "--images", "PATH", "--force"),
        ("allocate", "PATH", "--budget", "4"),
        ("allocate", "--budget", "4", "-o", "PATH"),
        ("calibrate", "PATH"),
        ("export", "PATH"),
        ("export", "-o", "PATH"),
        ("evaluate", "PATH", "--images", "images"),
        ("evaluate", "vitq-run/model.onnx", "--images", "PATH"),
        ("bench", "PATH"),
        ("report", "PATH"),
        ("report", "--run-dir", "PATH"),
        ("synthesize", "PATH"),
        ("show", "PATH"),
        ("demo", "--run-dir", "PATH"),
    ],
    ids=" ".join,
)
def test_paths_that_no_system_takes(session: Path, command: tuple[str, ...]):
    before = files(session)
    for path in ("x" * 300, "/".join(["d" * 200] * 30)):
        done = vitq(*(path if word == "PATH" else word for word in command), folder=session)
        assert done.code == 3 and "File name too long" in done.err and "Traceback" not in done.err, done.err
    assert files(session) == before


# What files may not do


def test_a_model_with_data_outside_its_folder(session: Path):
    (session / "secret").write_bytes(bytes(10_000))
    for location in ("../secret", str(session / "secret")):
        model = onnx.load(session / "vitq-run" / "model.onnx")
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (session / "vitq-run" / "outside.onnx").write_bytes(model.SerializeToString())
        for options in (("--images", "images"), ("--verify",)):
            done = vitq("evaluate", "vitq-run/outside.onnx", *options, folder=session)
            assert done.code == 3 and "outside.onnx" in done.err and "Traceback" not in done.err
        assert vitq("show", "vitq-run/outside.onnx", folder=session).code == 3


def test_a_model_with_an_unknown_operator(session: Path):
    model = onnx.load(session / "vitq-run" / "model.onnx")
    model.graph.node[0].domain = "evil.library"
    (session / "vitq-run" / "model.onnx").write_bytes(model.SerializeToString())
    done = vitq("evaluate", "vitq-run/model.onnx", "--images", "images", folder=session)
    assert done.code == 3 and "cannot be loaded by onnxruntime" in done.err


@pytest.mark.slow
def test_the_chain_needs_no_network(session: Path):
    """Whatever opens a socket fails; a process of its own, since libraries may have opened theirs before."""
    script = (
        "import socket, sys\n"
        "def refused(*_, **__): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused\n"
        "from vitq.cli.app import main\n"
        "for command in sys.stdin.read().splitlines():\n"
        "    try: main(command.split())\n"
        "    except SystemExit as ended: assert ended.code in (0, None), (command, ended.code)\n"
        "print('all done')"
    )
    commands = [
        "profile model --images images --num-images 8 --force",
        "allocate --budget 4 --force",
        "calibrate --force",
        "export --card --force",
        "evaluate vitq-run/model.onnx --images images",
        "bench --rounds 1",
        "report --force",
        "synthesize model --num-images 1 --iterations 1",
        "show vitq-run",
    ]
    offline = {name: value for name, value in environment().items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input="\n".join(commands),
        cwd=session,
        env=offline,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and "all done" in done.stdout, done.stderr
