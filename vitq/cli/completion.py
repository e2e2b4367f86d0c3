"""Names that options take, offered after TAB and checked at once; read from the registries' source, since importing those loads torch."""

import ast
import glob
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitq.choices import BASELINES
from vitq.errors import UsageError

ROOT = Path(__file__).parents[1]
_REGISTERED = re.compile(rb"^@register_model\s*\n(?:@[^\n]*\n)*def\s+(\w+)", re.MULTILINE)


def names_in(file: str, registry: str) -> list[str]:
    """The names of a registry, a dict or tuple that is written out in a file of vitq, in their order."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.Tuple):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if ast.unparse(target) == registry:
                names = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
                return [name.value for name in names if isinstance(name, ast.Constant) and isinstance(name.value, str)]
    raise LookupError(f"{file} has no {registry}")


def _from(file: str, registry: str) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in names_in(file, registry) if name.startswith(incomplete)]


metrics = _from("importance/__init__.py", "METRICS")
recipes = _from("calibration/__init__.py", "RECIPES")
trainings = _from("finetune/training.py", "RECIPES")
storages = _from("onnx_file/storage.py", "STORAGES")
objectives = _from("allocation/objectives.py", "OBJECTIVES")
presets = _from("allocation/presets.py", "PRESETS")


def architectures(incomplete: str) -> list[str]:
    """The names of timm's models, read from its source: each is a function under `@register_model`."""
    found = find_spec("timm")
    files = Path(found.origin).parent.glob("models/*.py") if found and found.origin else ()
    names = {name.decode() for file in files for name in _REGISTERED.findall(file.read_bytes())}
    return sorted(name for name in names if name.startswith(incomplete))


def models(incomplete: str) -> list[str]:
    """What a MODEL or an artifact may be: files and folders, and timm's names once they have begun."""
    places = sorted(glob.glob(glob.escape(incomplete) + "*"))  # noqa: PTH207 (a path as it was typed)
    return places + (architectures(incomplete) if incomplete else [])


def baselines(incomplete: str) -> list[str]:
    """What the other layers run at while a layer's sensitivity is measured."""
    return [name for name in BASELINES if name.startswith(incomplete)]


def known(what: str, names: Callable[[str], list[str]]) -> Callable[[Any], Any]:
    """An option's callback that refuses, before torch or a model is loaded, a name or one of several that is not among `names`."""

    def check(value: Any) -> Any:
        for name in value if isinstance(value, list | tuple) else [value]:
            if name is not None and name not in (accepted := names("")):
                raise UsageError(f"{what} {name!r} is not known; give one of {', '.join(accepted)}")
        return value

    return check


def devices(incomplete: str) -> list[str]:
    """Where torch may compute; whether it can is said when it is tried."""
    return [name for name in ("cpu", "cuda") if name.startswith(incomplete)]
