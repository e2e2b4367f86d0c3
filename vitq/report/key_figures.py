"""The handful of numbers that a reader wants first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitq.report.measured import Accuracy
from vitq.units import in_units


@dataclass(frozen=True)
class Figure:
    """A number, what it is, and what it is to be compared with."""

    name: str
    value: str
    beside: str


def key_figures(sections: Mapping[str, Any]) -> list[Figure]:
    """Those that the sections have; a section that is left out is None."""
    found = []
    if size := sections["size"]:
        shown = size.predicted if size.file is None else size.file
        times = f", {size.float_weights / shown:.1f} times as much" if shown else ""
        kind = "file, predicted" if size.file is None else "file"
        found.append(Figure(kind, in_units(shown, "B"), f"weights in float32: {in_units(size.float_weights, 'B')}{times}"))
    if (plan := sections["bit_map"]) and plan.sums:
        weights, activations = (plan.sums[f"average_{kind}_bits"] for kind in ("weight", "activation"))
        if activations is not None:
            value = f"{activations:.2f}" if weights is None else f"{weights:.2f} / {activations:.2f}"
            found.append(Figure("average bits", value, "weights / activations, searched layers"))
    if row := _own(sections["accuracy"]):
        result = row.found
        if result.top1 is not None and row.top1 is not None:
            change = "" if result.top1_change is None else f"; {result.top1_change:+.2f} points against float"
            found.append(Figure("top-1", f"{result.top1:.2f} %", f"{row.top1[0]:.1f} to {row.top1[1]:.1f} %{change}"))
        if result.agreement is not None and row.agreement is not None:
            moved = "" if result.kl is None else f"; KL {result.kl:.3g} nats"
            interval = f"{row.agreement[0]:.1f} to {row.agreement[1]:.1f} %"
            found.append(Figure("agrees with float", f"{result.agreement:.2f} %", f"{interval}{moved}"))
    if (latency := sections["latency"]) and latency.own:
        own = latency.own
        ratio = f"{_speed(own.median_ms, latency.baseline.median_ms)} as float32; " if latency.baseline else ""
        threads = f"{own.threads} thread{'s' * (own.threads != 1)}"
        found.append(Figure("latency", f"{own.median_ms:.2f} ms", f"{ratio}batch {own.batch}, {threads}"))
    return found


def _speed(own: float, other: float) -> str:
    """How fast one is that takes `own`, beside one that takes `other`: "2.50 times as fast", "1.10 times as slow"."""
    return f"{other / own:.2f} times as fast" if own <= other else f"{own / other:.2f} times as slow"


def _own(accuracy: tuple[Accuracy, ...] | None) -> Accuracy | None:
    """The exported file's results, else the calibrated model's."""
    rows = {row.name: row for row in accuracy or ()}
    return rows.get("model.onnx") or rows.get("model.safetensors")
