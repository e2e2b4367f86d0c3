"""The rules of docs/architecture.md that can be read off the source: floors, libraries, calls that run foreign code, and light imports.

The source is read with `ast`, imports inside functions included, so a fault is found in code that no test runs. Each fault names its
file and line. `test_finds_planted_faults` and its neighbours show that every rule can fail.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitq

ROOT = Path(__file__).parents[1]

# Bottom to top. A module or package of vitq may import those of the lines below its own, and its own files; nothing on its own line.
FLOORS = (
    ("errors", "choices", "units", "commands"),
    ("whole",),
    ("artifacts",),
    ("affine", "grid", "images", "intervals", "latency", "moments", "preparation", "processor", "weights"),
    ("augmented", "models", "graph", "quantizers", "runtime"),
    ("rewrites", "fakequant"),
    ("ranges", "gradients"),
    ("checkpoint", "accuracy", "fitting"),
    ("importance", "allocation", "calibration", "onnx_file"),
    ("trials", "bench", "doctor", "finetune", "synthesize"),
    ("report",),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: height for height, line in enumerate(FLOORS) for part in line}

# Where a library may be imported; one that is not named here may be imported anywhere.
LIBRARIES = {
    "timm": {"augmented", "models", "images"},
    "torchvision": {"images"},
    "PIL": {"images"},
    "highspy": {"allocation"},
    "matplotlib": {"allocation"},
    "jinja2": {"report"},
    "onnx": {"onnx_file"},
    "onnxscript": {"onnx_file"},
    "onnx_ir": {"onnx_file"},
    "onnxruntime": {"runtime", "onnx_file", "bench"},
    "rich": {"report", "cli"},
    "typer": {"report", "cli"},
    "click": {"report", "cli"},
    "torch": set(FLOOR)
    - {"errors", "choices", "commands", "artifacts", "grid", "intervals", "latency", "preparation", "processor", "units", "allocation"},
} | {name: set() for name in ("pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")}

# Libraries that another name in pyproject.toml brings.
BROUGHT_BY = {"PIL": "pillow", "torchvision": "timm", "click": "typer"}

IMPORT_CALLS = ("import_module", "importlib.import_module", "__import__")


def dependencies() -> set[str]:
    """The distributions that pyproject.toml requires, extras for users included, as import names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = project["dependencies"] + project["optional-dependencies"]["plots"]
    return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in required}


def faults(file: str, source: str, required: frozenset[str] = frozenset(dependencies())) -> list[str]:
    """What breaks a rule in one file of vitq; `file` is its path from the root of the project, as in vitq/allocation/solver.py."""
    part = file.removeprefix("vitq/").removesuffix(".py").split("/")[0]
    if part not in FLOOR and part != "__init__":
        return [f"{file}:1: {part} has no floor; give it one in FLOORS of tests/test_architecture.py"]
    tree = ast.parse(source)
    return [f"{file}:{line}: {fault}" for line, fault in sorted([*import_faults(part, tree, file, required), *call_faults(part, tree)])]


def import_faults(part: str, tree: ast.Module, file: str, required: frozenset[str]) -> Iterator[tuple[int, str]]:
    for line, name in imports(tree, file):
        library, *inner = name.split(".")
        if library == "vitq":
            yield from ((line, fault) for fault in floor_faults(part, inner[0] if inner else ""))
        elif part not in LIBRARIES.get(library, FLOOR) and part != "__init__":
            allowed = ", ".join(sorted(LIBRARIES[library])) or "nowhere"
            yield line, f"{part} imports {library}, which is allowed in: {allowed}"
        elif library not in sys.stdlib_module_names and BROUGHT_BY.get(library, library) not in required:
            yield line, f"{part} imports {library}, which pyproject.toml does not require"
        elif part == "__init__" and library not in sys.stdlib_module_names:
            yield line, f"vitq/__init__.py imports {library}; importing vitq must stay light"


def floor_faults(part: str, target: str) -> Iterator[str]:
    if part == "__init__":
        yield f"vitq/__init__.py imports vitq.{target}; name it in _PUBLIC, so that it is loaded on first use"
    elif not target:
        yield f"{part} imports vitq itself; write `from vitq import __version__`, or import from the module that defines what you need"
    elif target not in FLOOR:
        yield f"{part} imports vitq.{target}; import from the module that defines it"
    elif target != part and FLOOR[target] >= FLOOR[part]:
        yield f"{part} imports vitq.{target}, which is not on a floor below"


def imports(tree: ast.Module, file: str) -> Iterator[tuple[int, str]]:
    """Every imported module with its line, wherever in the file; names taken from `vitq` itself count as its modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(Path(file).with_suffix("").parts[: -node.level]) if node.level else ""
            module = ".".join(filter(None, (package, node.module)))
            if module != "vitq":
                yield node.lineno, module
            else:  # from vitq import __version__ is the one value that every floor may read
                yield from ((node.lineno, f"vitq.{alias.name}") for alias in node.names if alias.name != "__version__")
        elif isinstance(node, ast.Call) and called(node) in IMPORT_CALLS and node.args and isinstance(node.args[0], ast.Constant):
            yield node.lineno, str(node.args[0].value)


def call_faults(part: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        given = {keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
        if name.removeprefix("builtins.") in ("eval", "exec"):
            yield node.lineno, f"{name}() runs text as code"
        elif name == "torch.load" and given.get("weights_only") is not True:
            yield node.lineno, "torch.load without weights_only=True runs code from the file"
        elif name in ("np.load", "numpy.load") and given.get("allow_pickle", False) is not False:
            yield node.lineno, f"{name} with allow_pickle runs code from the file"
        elif name in IMPORT_CALLS and part != "__init__" and not (node.args and isinstance(node.args[0], ast.Constant)):
            yield node.lineno, f"{name} of a computed name hides what is imported"
    for node in ast.walk(tree):  # under another name, the calls above would not be seen
        if isinstance(node, ast.Import) and any(alias.name == "torch" and alias.asname for alias in node.names):
            yield node.lineno, "torch is imported under another name"
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and any(alias.name == "load" for alias in node.names):
            yield node.lineno, "load is imported from torch; write torch.load(..., weights_only=True)"


def called(node: ast.Call) -> str:
    """The dotted name that is called, "" for anything else."""
    name = ast.unparse(node.func)
    return name if name.replace(".", "").isidentifier() else ""


def all_faults(root: Path) -> list[str]:
    files = sorted((root / "vitq").rglob("*.py"))
    assert files, f"no source under {root}"
    return [fault for file in files for fault in faults(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8"))]


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `statement`."""
    script = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_source_keeps_the_rules():
    found = all_faults(ROOT)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("vitq/affine.py", "import vitq.ranges", "vitq/affine.py:1: affine imports vitq.ranges, which is not on a floor below"),
        ("vitq/affine.py", "from vitq.images import read", "vitq/affine.py:1: affine imports vitq.images, which is not on a floor below"),
        ("vitq/affine.py", "from vitq import cli", "affine imports vitq.cli, which is not on a floor below"),
        ("vitq/affine.py", "x = 1\n\ndef f():\n    from .graph import capture", "vitq/affine.py:4: affine imports vitq.graph"),
        (
            "vitq/onnx_file/storage.py",
            "from ..calibration import fast",
            "onnx_file imports vitq.calibration, which is not on a floor below",
        ),
        ("vitq/onnx_file/storage.py", "import importlib\nimportlib.import_module('vitq.cli')", "storage.py:2: onnx_file imports vitq.cli"),
        ("vitq/graph/layers.py", "from vitq import allocate", "graph imports vitq.allocate; import from the module that defines it"),
        ("vitq/graph/layers.py", "import vitq", "graph imports vitq itself"),
        ("vitq/tools.py", "", "vitq/tools.py:1: tools has no floor"),
        ("vitq/tools/more.py", "", "vitq/tools/more.py:1: tools has no floor"),
        ("vitq/__init__.py", "from vitq.errors import VitqError", "name it in _PUBLIC"),
        ("vitq/__init__.py", "import numpy", "importing vitq must stay light"),
        ("vitq/allocation/solver.py", "def f():\n    import torch.nn", "solver.py:2: allocation imports torch, which"),
        ("vitq/artifacts/plan.py", "from torch import Tensor", "artifacts imports torch"),
        ("vitq/graph/layers.py", "import timm", "graph imports timm, which is allowed in: augmented, images, models"),
        ("vitq/trials/refine.py", "import highspy", "trials imports highspy, which is allowed in: allocation"),
        ("vitq/accuracy.py", "import onnx", "accuracy imports onnx, which is allowed in: onnx_file"),
        ("vitq/calibration/fast.py", "import onnxruntime", "which is allowed in: bench, onnx_file, runtime"),
        ("vitq/images/pictures.py", "from rich.progress import track", "images imports rich, which is allowed in: cli, report"),
        ("vitq/cli/app.py", "import pickle", "cli imports pickle, which is allowed in: nowhere"),
        ("vitq/cli/app.py", "import einops", "cli imports einops, which pyproject.toml does not require"),
        ("vitq/cli/app.py", "import importlib\nimportlib.import_module(name)", "app.py:2: importlib.import_module of a computed name"),
        ("vitq/models.py", "x = eval('1')", "models.py:1: eval() runs text as code"),
        ("vitq/models.py", "import builtins\nbuiltins.exec('1')", "models.py:2: builtins.exec() runs text as code"),
        ("vitq/models.py", "import torch\ntorch.load(path)", "models.py:2: torch.load without weights_only=True"),
        ("vitq/models.py", "import torch\ntorch.load(path, weights_only=False)", "models.py:2: torch.load without weights_only=True"),
        ("vitq/models.py", "import torch\ntorch.load(path, weights_only=safe)", "models.py:2: torch.load without weights_only=True"),
        ("vitq/models.py", "from torch import load", "models.py:1: load is imported from torch"),
        ("vitq/models.py", "import torch as t", "models.py:1: torch is imported under another name"),
        ("vitq/ranges.py", "import numpy as np\nnp.load(path, allow_pickle=True)", "ranges.py:2: np.load with allow_pickle"),
    ],
)
def test_finds_planted_faults(file: str, source: str, fault: str):
    found = faults(file, source)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vitq/ranges.py", "import math\nimport numpy as np\nimport torch\nfrom vitq import __version__\nfrom vitq.affine import quantize"),
        ("vitq/allocation/__init__.py", "import highspy\nfrom vitq.allocation.solver import solve\nfrom . import budgets"),
        ("vitq/images/pictures.py", "from PIL import Image\nimport timm.data\nfrom vitq.errors import InputError"),
        ("vitq/models.py", "import torch\nmodel.eval()\ntorch.load(path, weights_only=True)\npattern.exec()"),
        ("vitq/__init__.py", "from importlib import import_module\nimport_module(name)"),
        ("vitq/__main__.py", "from vitq.cli.app import main"),
    ],
)
def test_lets_good_source_pass(file: str, source: str):
    assert faults(file, source) == []


def test_reads_every_file(tmp_path: Path):
    for name, source in {"errors.py": "", "onnx_file/onnx.py": "import onnx", "deep/er/still.py": ""}.items():
        file = tmp_path / "vitq" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    assert [fault.split(":")[0] for fault in all_faults(tmp_path)] == ["vitq/deep/er/still.py"]


@pytest.mark.parametrize("module", ["vitq", "vitq.errors", "vitq.artifacts", "vitq.latency", "vitq.allocation", "vitq.cli.app"])
def test_imports_without_torch(module: str):
    heavy = {"torch", "timm", "onnx", "onnxruntime", "onnxscript"} | ({"highspy"} if module != "vitq.allocation" else set())
    assert not loaded_by(f"import {module}") & heavy


@pytest.mark.parametrize("arguments", [[], ["--help"], ["allocate", "--help"], ["calibrate", "--recipe", "TAB"]])
def test_help_and_completion_load_nothing_slow(arguments: list[str], monkeypatch: pytest.MonkeyPatch):
    """`import vitq`, `vitq --help`, the help of a command and TAB answer at once: what takes long to import is not imported."""
    script = f"from contextlib import suppress\nfrom vitq.cli.app import main\nwith suppress(SystemExit): main({arguments})"
    if arguments[-1:] == ["TAB"]:
        monkeypatch.setenv("_VITQ_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"vitq {' '.join(arguments[:-1])} f")
        monkeypatch.setenv("COMP_CWORD", "3")
    loaded = loaded_by(script if arguments else "import vitq")
    assert ("typer" in loaded) == bool(arguments)
    slow = {"torch", "timm", "onnx", "onnxruntime", "numpy", "scipy", "highspy", "PIL", "jinja2", "huggingface_hub"}
    slow |= {"pydantic"} if len(arguments) < 2 else set()  # typer loads it for a command's options
    assert not loaded & slow


def test_a_loaded_library_is_seen():
    assert "torch" in loaded_by("import torch")
    assert "torch" not in loaded_by("")


def test_public_names_exist_and_are_no_modules():
    for name in vitq._PUBLIC:
        assert callable(getattr(vitq, name)), name
        assert name not in FLOOR, f"vitq.{name} would be hidden by the module of that name"


def test_type_checkers_are_told_the_public_names():
    stub = ast.parse((ROOT / "vitq" / "__init__.pyi").read_text())
    told = {}
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            told |= {alias.asname: f"{node.module}:{alias.name}" for alias in node.names}
    assert told == vitq._PUBLIC


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'vitq' has no attribute 'quantise'; it has load, "):
        _ = vitq.quantise
