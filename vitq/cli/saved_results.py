"""The results that `vitq evaluate` and `vitq bench` keep in a run folder: read, checked, and as tables."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitq.cli.bench import bench_tables
from vitq.cli.layer_table import plain_table
from vitq.commands import BENCH, EVALUATION, ONNX, in_run
from vitq.errors import InputError
from vitq.intervals import COUNTED, wilson
from vitq.units import in_decimals

if TYPE_CHECKING:
    from rich.table import Table

    from vitq.artifacts.results import Benchmark, Evaluated

_MEASURES = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "agreement": "agreement %",
    "kl": "KL nats",
    "cosine": "cosine",
    "relative_error": "error",
}


def read_evaluations(path: Path) -> "dict[str, Evaluated]":
    """What was evaluated, by name; raises InputError where the file is damaged."""
    from vitq.artifacts.results import Evaluated

    return _read(path, dict[str, Evaluated], f"vitq evaluate {shlex.quote(str(path.with_name(ONNX)))} --images PATH")


def read_benchmark(path: Path) -> "Benchmark":
    """What was timed; raises InputError where the file is damaged."""
    from vitq.artifacts.results import Benchmark

    return _read(path, Benchmark, in_run("vitq bench", path.parent))


def saved_result(path: Path) -> "tuple[str, dict[str, Any], list[Table]] | None":
    """(what it is, its content, tables) of a file with the name of a saved result; None for any other."""
    if path.name == EVALUATION:
        evaluated = read_evaluations(path)
        found = {name: entry.model_dump(exclude_none=True) for name, entry in evaluated.items()}
        return "evaluations", {"results": found}, [evaluation_table(evaluated)]
    if path.name == BENCH:
        timed = read_benchmark(path)
        found = timed.model_dump(mode="json")
        return "latencies", found, bench_tables(timed.results, found["files"])
    return None


def evaluation_table(evaluated: "Mapping[str, Evaluated]") -> "Table":
    """A row an artifact, a column a measure that any has, counted shares over their 95 % intervals."""
    known = {name: title for name, title in _MEASURES.items() if any(getattr(entry, name) is not None for entry in evaluated.values())}
    rows = [
        (artifact, str(entry.num_images), *(_measure(name, getattr(entry, name), entry.num_images) for name in known))
        for artifact, entry in evaluated.items()
    ]
    return plain_table(("evaluated", "images", *known.values()), rows)


def _measure(name: str, value: float | None, num_images: int) -> str:
    if value is None:
        return "-"
    if name not in COUNTED:
        return in_decimals(value)
    low, high = wilson(value, num_images)
    return f"{value:.2f}\n{low:.1f} to {high:.1f}"


def _read(path: Path, kind: Any, command: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (ValidationError, OSError) as error:
        fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{path} is damaged: {place}{': ' if place else ''}{fault['msg']}; run `{command}` again, or delete it") from None
