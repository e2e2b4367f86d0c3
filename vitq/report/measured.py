"""What was measured: accuracy, the file's size and its latency, against what was predicted."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitq.artifacts.results import Evaluated, Timed
from vitq.intervals import wilson
from vitq.report import pictures
from vitq.report.bit_map import sums
from vitq.report.findings import Findings, Lacking

_BASELINES = ("float32", "quantize_dynamic", "quantize_static")


@dataclass(frozen=True)
class Accuracy:
    """One artifact's saved measurements, counted shares with their Wilson intervals (low, high) in percent."""

    name: str
    found: Evaluated
    top1: tuple[float, float] | None
    top5: tuple[float, float] | None
    agreement: tuple[float, float] | None
    whisker: pictures.Whisker | None


def accuracy(findings: Findings) -> tuple[Accuracy, ...] | Lacking:
    """Every artifact in evaluate.json."""
    if not findings.evaluations:
        return Lacking(f"vitq evaluate {findings.quoted('model.onnx')} --images PATH", _once_exported(findings))

    def interval(found: Evaluated, name: str) -> tuple[float, float] | None:
        value = getattr(found, name)
        return None if value is None else wilson(value, found.num_images)

    top1 = {
        name: (found.top1, *wilson(found.top1, found.num_images)) for name, found in findings.evaluations.items() if found.top1 is not None
    }
    drawn = dict(zip(top1, pictures.whiskers([(low, middle, high) for middle, low, high in top1.values()]), strict=True))
    return tuple(
        Accuracy(name, found, interval(found, "top1"), interval(found, "top5"), interval(found, "agreement"), drawn.get(name))
        for name, found in findings.evaluations.items()
    )


def _once_exported(findings: Findings) -> str:
    return "" if findings.file("model.onnx") else f"once `vitq export{findings.option}` has written model.onnx"


@dataclass(frozen=True)
class Amount:
    """Bytes of something, and what percent of the largest beside it that is."""

    name: str
    bytes: int
    percent: float


@dataclass(frozen=True)
class Size:
    """Bytes against each other; `difference` is by how many percent the file is larger than predicted."""

    amounts: tuple[Amount, ...]
    file: int | None
    predicted: int
    difference: float | None
    float_weights: int
    planned_weights: int


def size(findings: Findings) -> Size | Lacking:
    """The exported file against what the plan predicts, and against float32 weights."""
    found = sums(findings)
    if found is None or findings.profile is None or findings.chosen is None:
        command = "vitq profile MODEL --images PATH" if findings.profile is None else "vitq allocate --budget 4.0"
        return Lacking(command + findings.option)
    bits = findings.chosen.bits
    floats = sum(4 * layer.parameters for layer in findings.profile.layers)
    planned = sum(layer.parameters * (bits[layer.name].weight_bits or 0) for layer in findings.profile.layers) // 8
    predicted, relative = found["size_bytes"], found["relative_to_uniform"]
    rows = [("weights of the layers, float32", floats)]
    if relative["size"]:
        rows.append(("file, predicted with the same average, equal everywhere", round(predicted / relative["size"])))
    rows.append(("file, predicted for this plan", predicted))
    file = findings.file("model.onnx")
    if file is not None:
        rows.append(("file, exported", file.bytes))
    largest = max(count for _, count in rows) or 1
    amounts = tuple(Amount(name, count, round(100 * count / largest, 2)) for name, count in rows)
    difference = 100 * (file.bytes - predicted) / predicted if file else None
    return Size(amounts, file.bytes if file else None, predicted, difference, floats, planned)


@dataclass(frozen=True)
class Latency:
    """Measured files, the slowest as 100 percent, and what a measured table predicts for the plan, in milliseconds."""

    results: tuple[tuple[Timed, float], ...]
    loaded: tuple[Any, ...]
    own: Timed | None
    baseline: Timed | None
    predicted: float | None


def latency(findings: Findings) -> Latency | Lacking:
    """Every file in bench.json."""
    predicted = (sums(findings) or {}).get("latency_ms")
    results = findings.benchmark.results if findings.benchmark else ()
    if not results and predicted is None:
        return Lacking(f"vitq bench {findings.quoted('model.onnx')} --baselines", _once_exported(findings))
    own = next((row for row in results if row.name in ("model.onnx", str(Path(findings.folder) / "model.onnx"))), None)
    own = own or next((row for row in results if row.name not in _BASELINES), None)
    baseline = next((row for row in results if own and row.name == "float32" and row.batch == own.batch), None)
    slowest = {row.batch: max(other.median_ms for other in results if other.batch == row.batch) for row in results}
    shares = tuple((row, round(100 * row.median_ms / slowest[row.batch], 2)) for row in results)
    return Latency(shares, findings.benchmark.files if findings.benchmark else (), own, baseline, predicted)
