"""Artifacts as JSON: written byte for byte the same, read with every fault named by its place in the document."""

import json
import math
import reprlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vitq.artifacts.layers import Value
from vitq.artifacts.plan import BitPlan, Staircase
from vitq.artifacts.profile import Profile
from vitq.commands import writing
from vitq.errors import InputError
from vitq.whole import refuse_existing, refuse_missing, write_whole

T = TypeVar("T", bound=Value)


def dump(artifact: Value) -> str:
    """The artifact as JSON text, byte-identical for equal values."""
    return json.dumps(artifact.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def save(artifact: Value, path: str | Path, force: bool = False) -> None:
    """Writes the artifact as JSON; the file appears whole or not at all.

    Raises:
        UsageError: the file exists and `force` is not set.
    """
    refuse_existing(path, force)
    write_whole(path, lambda temporary: temporary.write_text(dump(artifact), encoding="utf-8"))


def load_profile(path: str | Path) -> Profile:
    """Reads and validates a profile; raises InputError for a missing, damaged or foreign file."""
    return load_artifact(path, Profile, "vitq profile MODEL --images PATH")


def load_plan(path: str | Path) -> BitPlan:
    """Reads and validates a plan; raises InputError for a missing, damaged or foreign file."""
    return load_artifact(path, BitPlan, "vitq allocate --budget 4.0")


def load_staircase(path: str | Path) -> Staircase:
    """Reads and validates a staircase; raises InputError for a missing, damaged or foreign file."""
    return load_artifact(path, Staircase, "vitq allocate --pareto FILE")


def load_artifact(path: str | Path, kind: type[T], made_by: str) -> T:
    """Reads and validates an artifact that the command `made_by` writes; raises InputError for a missing, damaged or foreign file."""
    expected, again = kind.model_fields["format"].default, writing(made_by, path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except (FileNotFoundError, IsADirectoryError):
        refuse_missing(path, made_by)
        raise
    except UnicodeDecodeError:
        raise InputError(f"{path} is no JSON but another kind of file; give what `{made_by}` writes") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; `{again}` writes a new one") from None
    if _depth(data) > 100:
        raise InputError(f"{path} is nested deeper than 100 levels; `{again}` writes a new one")
    if not isinstance(data, dict) or data.get("format") != expected:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path} is not a {expected} file (found {reprlib.repr(found)}); `{again}` writes one")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(data, first["loc"])
        raise InputError(
            f"{path}: {place}{first['msg']} (got {reprlib.repr(first['input'])}); correct it or write a new one with `{again}`"
        ) from None


def _place(data: Any, location: tuple[int | str, ...]) -> str:
    """Where in the document a fault is, with the layer's name where an entry of a list has one."""
    words = []
    for step in location:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            data = None
        name = data.get("name") if isinstance(data, dict) else None
        words.append(f"{step} ({name})" if isinstance(name, str) else str(step))
    return ".".join(words) + ": " if words else ""


def _depth(data: Any) -> int:
    """How deep the JSON value is nested; what is deeper than some hundred levels could be read but not written again."""
    depth, level = 0, [data]
    while level:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())]
    return depth


def _finite(text: str) -> float:
    """A JSON number; NaN, Infinity and what is too large for a float (1e999) are none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
