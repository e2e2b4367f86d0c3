"""kill -9 at random moments of every command that writes: what is there is whole, nothing stands in the way, and nothing piles up.

Moments are seeded: half of them are the n-th write, rename or removal in the folder, half a time since the start. `KILLS` of each command
are tried; VITQ_KILLS=20 looks closer.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_session import environment, vitq
from PIL import Image

from vitq import checkpoint
from vitq.artifacts import load_plan, load_profile, load_staircase
from vitq.onnx_file.digests import check_digests

KILLS = int(os.environ.get("VITQ_KILLS", "2"))

PROFILE = ("profile", "model", "--images", "images", "--num-images", 16, "--batch-size", 8, "--force")
COMMANDS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "profile": (PROFILE, ("profile.json",)),
    "sensitivity": ((*PROFILE, "--metric", "sensitivity", "--bits", "4,8"), ("profile.json",)),
    "allocate": (("allocate", "--budget", "4", "--pareto", "vitq-run/staircase.json", "--force"), ("plan.json", "staircase.json")),
    "calibrate": (("calibrate", "--force"), ("model.safetensors",)),
    "reconstruct": (("calibrate", "--recipe", "reconstruct", "--iterations", 2, "--batch-size", 8, "--force"), ("model.safetensors",)),
    "finetune": (
        ("finetune", "--images", "images", "--epochs", 1, "--batch-size", 8, "--save-minutes", 0),
        ("model.safetensors", "calibrated.safetensors"),
    ),
    "export": (("export", "--card", "--force"), ("model.onnx", "README.md")),
    "evaluate": (("evaluate", "vitq-run/model.onnx", "--images", "images"), ("evaluate.json",)),
    "bench": (("bench", "--rounds", 2), ("bench.json",)),
    "report": (("report", "--force"), ("report.html",)),
    "synthesize": (
        ("synthesize", "model", "--num-images", 3, "--batch-size", 2, "--iterations", 2, "--preview", "vitq-run/sheet.png", "--force"),
        ("images.safetensors", "sheet.png"),
    ),
    "demo": (("demo", "--run-dir", "demo", "--force"), ()),
}
"""What is run, and what it writes."""


def parses(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


WHOLE: dict[str, Callable[[Path], object]] = {
    "profile.json": load_profile,
    "plan.json": load_plan,
    "staircase.json": load_staircase,
    "staircase.svg": lambda path: path.read_text().rstrip().endswith("</svg>") or pytest.fail(f"{path} is cut"),
    "model.safetensors": checkpoint.load,
    "calibrated.safetensors": checkpoint.load,
    "model.onnx": check_digests,
    "evaluate.json": parses,
    "bench.json": parses,
    "report.html": lambda path: path.read_text().rstrip().endswith("</html>") or pytest.fail(f"{path} is cut"),
    "README.md": lambda path: path.read_text().startswith("---") or pytest.fail(f"{path} is cut"),
    "images.safetensors": lambda path: vitq("show", path).code == 0 or pytest.fail(f"{path} cannot be read"),
    "sheet.png": lambda path: Image.open(path).load(),
}
LEFT = re.compile(r"\.[\w.-]+\.part|\.[\w-]+\.journal\.jsonl|\.[\w-]+\.scratch|\.[\w-]+\.finetuning\.safetensors|\.unfinished-demo")
"""What a killed run may leave; all of it is hidden, and gone after the next run."""


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., dict]]:
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("kill_server.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment() | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None

    def ask(arguments: tuple[object, ...], folder: Path, **when: float | None) -> dict:
        request = {"arguments": list(map(str, arguments)), "folder": str(folder), "small_demo": arguments[0] == "demo", **when}
        print(json.dumps(request), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_leaves_nothing_half_done(name: str, finished: Path, run: Callable[..., dict], tmp_path: Path):
    if name == "demo" and "VITQ_KILLS" not in os.environ:
        pytest.skip("the demo takes minutes; VITQ_KILLS=2 tries it too")
    command, outputs = COMMANDS[name]
    session = shutil.copytree(finished, tmp_path / "session")
    folder = session / ("demo" if name == "demo" else "vitq-run")
    if name == "finetune":  # from a start that a few steps improve: another one is not replaced
        assert run(("calibrate", "--num-images", 2, "--force"), session)["code"] == 0
    undisturbed = {"code": 0, "events": 20, "seconds": 20} if name == "demo" else run(command, session)  # the demo takes long
    assert undisturbed["code"] == 0, undisturbed["err"]
    assert undisturbed["events"] > 0
    expected = {path: path.read_bytes() for path in map(folder.joinpath, outputs)}
    chance = random.Random(zlib.crc32(name.encode()))
    killed = 0
    for number in range(KILLS):
        # With an earlier output in place, and without; a fine-tuning's is its start too.
        for path in expected if number % 4 > 1 and name != "finetune" else ():
            path.unlink(missing_ok=True)
        if number % 2:
            when: dict[str, float] = {"seconds": chance.uniform(0, undisturbed["seconds"])}
        else:
            when = {"events": chance.randint(1, undisturbed["events"])}
        done = run(command, session, **when)
        killed += done["code"] == -9
        assert done["code"] in (0, -9), (when, done["err"])
        for path in session.rglob("*"):
            within = path.relative_to(session)
            hidden = next((part for part in within.parts if part.startswith(".")), None)
            if hidden is not None:
                assert LEFT.fullmatch(hidden), (when, within)
            elif path.is_file() and within.parts[0] in ("vitq-run", "demo"):
                WHOLE[path.name](path)
    assert killed >= KILLS // 2
    again = run(command, session)
    assert again["code"] == 0, again["err"]
    assert not list(session.rglob(".*")), "what killed runs left is still there"
    for path, content in expected.items():
        if name not in ("bench", "evaluate", "report"):
            assert path.read_bytes() == content or name in ("profile", "allocate", "finetune", "export"), path
        WHOLE[path.name](path)
