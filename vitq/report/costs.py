"""What layers cost, predicted by the profile and found by calibration, as numbers with a common unit and a shade."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vitq import grid
from vitq.report.bit_map import Bits, sums
from vitq.report.findings import Findings, Lacking, asked

SHADES = 6
"""How many steps of colour a cost may have."""

_HURTING = 3


@dataclass(frozen=True)
class Heat:
    """A cost with its text in the section's unit and its shade, 0 to SHADES - 1."""

    text: str
    shade: int
    marked: bool = False


@dataclass(frozen=True)
class Sensitivity:
    """What each layer costs at one width; the sums are texts in the same unit, by block and by column."""

    grid: grid.Grid
    metric: str
    width: int
    unit: str
    by_block: Mapping[str, str]
    by_type: Mapping[str, str]


def sensitivity(findings: Findings) -> Sensitivity | Lacking:
    """The profile's costs at the width nearest to the plan's average."""
    profile = findings.profile
    if profile is None or not profile.costs:
        return Lacking(f"vitq profile MODEL --images PATH{findings.option}")
    wishes = asked(findings.chosen)
    metric = wishes.metric if wishes and wishes.metric in profile.costs else next(iter(profile.costs))
    table = profile.costs[metric]
    average = (sums(findings) or {}).get("average_activation_bits") or 4
    width = min(table.bits, key=lambda bits: (abs(bits - average), bits))
    costs = {name: found[table.bits.index(width)] for name, found in table.tied.items()}
    where = grid.places(profile, None)
    power = _power(list(costs.values()))
    by_block, by_type = (_sums_by(kind, costs, where, power) for kind in ("block", "type"))
    return Sensitivity(grid.lay_out(where, _heats(costs, power)), metric, width, _unit(power, table.unit), by_block, by_type)


def _sums_by(kind: str, costs: Mapping[str, float], where: Mapping[str, grid.Place], power: int) -> dict[str, str]:
    """The costs of all layers of each block, or of each type, as texts."""
    keys = {getattr(place, kind) for place in where.values()}
    sums_by_key = {key: math.fsum(costs[name] for name in where if getattr(where[name], kind) == key) for key in keys}
    return {key: _text(value, power) for key, value in sums_by_key.items()}


def _power(values: list[float]) -> int:
    """The power of ten, a multiple of three, by which the largest of the values lies from 1 to 1000."""
    largest = max(map(abs, values), default=0.0)
    return 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0


def _unit(power: int, unit: str) -> str:
    unit = {"nats": "nats an image", "accuracy": "points of accuracy", "relative": "relative units"}.get(unit, unit)
    return f"10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))} {unit}" if power else unit


def _heats(values: Mapping[str, float], power: int, marked: tuple[str, ...] = ()) -> dict[str, Heat]:
    """Equal ratios of cost are equal steps of shade, from the smallest, or a thousandth of the largest, to the largest."""
    positive = [value for value in values.values() if value > 0]
    largest = max(positive, default=1.0)
    smallest = max(min(positive, default=1.0), largest / 1000)

    def heat(name: str, value: float) -> Heat:
        share = math.log(value / smallest) / (math.log(largest / smallest) or 1.0) if value > 0 else 0.0
        return Heat(_text(value, power), min(max(int(share * SHADES), 0), SHADES - 1), name in marked)

    return {name: heat(name, value) for name, value in values.items()}


def _text(value: float, power: int) -> str:
    """Three digits of a cost in units of a power of ten."""
    scaled = value / 10.0**power
    return f"{scaled:.0f}" if abs(scaled) >= 100 else f"{scaled:.1f}" if abs(scaled) >= 10 else f"{scaled:.2f}"


@dataclass(frozen=True)
class LayerError:
    """What one layer's quantization does: decibels, nats per image, and its percent of all layers' KL."""

    layer: str
    bits: Bits | None
    sqnr: float | None
    kl: float
    share: float


@dataclass(frozen=True)
class Errors:
    """The layers' errors as the network is laid out, and as a list, the worst first."""

    grid: grid.Grid
    unit: str
    whole: float
    worst: tuple[LayerError, ...]
    hurting: tuple[LayerError, ...]


def errors(findings: Findings) -> Errors | Lacking:
    """From what calibration found on the first of its images."""
    plan = findings.calibrated
    if plan is None:
        return Lacking(f"vitq calibrate{findings.option}")
    if not findings.errors:
        command = f"vitq calibrate --force{findings.option}"
        return Lacking(command, "model.safetensors holds no errors of its layers")
    costs = _costs(findings)
    whole = math.fsum(costs.values())
    bits = {entry.name: Bits(entry.weight_bits, entry.activation_bits, entry.name in plan.fixed) for entry in plan.layers}
    rows = tuple(
        LayerError(name, bits.get(name), findings.errors[name]["sqnr"], costs[name], 100 * costs[name] / (whole or 1.0))
        for name in sorted(costs, key=lambda name: (-costs[name], name))
    )
    power = _power(list(costs.values()))
    text = _unit(power, "nats" if plan.model.num_classes else "of half the relative squared error")
    names = hurting(findings)
    laid = grid.lay_out(grid.places(findings.profile, plan), _heats(costs, power, names))
    return Errors(laid, text, whole, rows, rows[: len(names)])


def hurting(findings: Findings) -> tuple[str, ...]:
    """The names of the layers that cost most, the worst first."""
    costs = _costs(findings)
    return tuple(sorted((name for name in costs if costs[name] > 0), key=lambda name: (-costs[name], name))[:_HURTING])


def _costs(findings: Findings) -> dict[str, float]:
    """Each layer's KL; 0 where there is no number."""
    found = {name: error["kl"] for name, error in findings.errors.items()}
    return {name: kl if kl is not None and math.isfinite(kl) else 0.0 for name, kl in found.items()}
