"""The commands that read and write the files of a run folder, as messages propose them: to be pasted where they are read.

They name the run folder where it is not the usual one, and --force where the file that they would write is there already.
"""

import shlex
from pathlib import Path

DEFAULT_FOLDER = Path("vitq-run")
PROFILE, PLAN, CHECKPOINT, ONNX = "profile.json", "plan.json", "model.safetensors", "model.onnx"
CALIBRATED = "calibrated.safetensors"
EVALUATION, BENCH, LATENCY = "evaluate.json", "bench.json", "latency.json"
STAIRCASE, REPORT, IMAGES = "staircase.json", "report.html", "images.safetensors"

_REFUSING = {"profile": PROFILE, "allocate": PLAN, "calibrate": CHECKPOINT, "export": ONNX, "report": REPORT}
"""What the commands write that refuse to replace it."""
_OVERWRITING = {"bench": LATENCY}
"""What the others write that messages speak of: `vitq bench --layers`."""


def in_run(command: str, folder: Path) -> str:
    """The command that works in a run folder, and writes the usual file there."""
    return _forced(command, folder) + _option(folder)


def in_folder(command: str, path: Path, name: str) -> str:
    """The command that reads the artifact at `path`, by as few words as possible, and writes the usual file beside it."""
    if path.name != name:
        return f"{_forced(command, path.parent)} {shlex.quote(str(path))}"
    return in_run(command, path.parent)


def writing(command: str, path: str | Path) -> str:
    """The command, such as `vitq calibrate`, that writes the artifact at `path`; over no file of another name than usual."""
    path = Path(path)
    if path.name == usual_name(command):
        return in_run(command, path.parent)
    there = _option(path.parent) if (path.parent / PROFILE).is_file() else ""
    return command + there + ("" if path.exists() else f" -o {shlex.quote(str(path))}")


def usual_name(command: str) -> str:
    """What the file is called that a command writes."""
    return (_REFUSING | _OVERWRITING)[command.split()[1]]


def _option(folder: Path) -> str:
    return "" if folder == DEFAULT_FOLDER else f" --run-dir {shlex.quote(str(folder))}"


def _forced(command: str, folder: Path) -> str:
    name = _REFUSING.get(command.split()[1])
    return f"{command} --force" if name and (folder / name).exists() else command
