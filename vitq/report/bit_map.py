"""The chosen plan laid out as the network is, and what it comes to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitq import grid
from vitq.allocation.summary import summarize_plan
from vitq.artifacts import WIDTHS, Profile
from vitq.report.findings import Findings, Lacking


@dataclass(frozen=True)
class Bits:
    """The widths of one layer; `weight` is None for a matmul."""

    weight: int | None
    activation: int
    fixed: bool


@dataclass(frozen=True)
class Share:
    """How much of the weights, and of the activations by their MACs, has a width; None where the layers' sizes are not known."""

    bits: int
    weights: float | None
    activations: float | None


@dataclass(frozen=True)
class BitMap:
    """The plan laid out as the network is."""

    grid: grid.Grid
    shares: tuple[Share, ...]
    sums: Mapping[str, Any]
    count: int
    lowest: int
    highest: int


def bit_map(findings: Findings) -> BitMap | Lacking:
    """The bits of every layer."""
    plan, profile = findings.chosen, findings.profile
    if plan is None:
        return Lacking(f"vitq allocate --budget 4.0{findings.option}")
    shown = {entry.name: Bits(entry.weight_bits, entry.activation_bits, entry.name in plan.fixed) for entry in plan.layers}
    laid = grid.lay_out(grid.places(profile, plan), shown)
    used = sorted({bits for entry in shown.values() for bits in (entry.weight, entry.activation) if bits is not None}) or [0]
    return BitMap(laid, _shares(shown, profile), sums(findings) or {}, len(shown), used[0], used[-1])


def _shares(shown: Mapping[str, Bits], profile: Profile | None) -> tuple[Share, ...]:
    if profile is None:
        return tuple(Share(bits, None, None) for bits in WIDTHS)
    parameters, macs = dict.fromkeys(WIDTHS, 0), dict.fromkeys(WIDTHS, 0)
    for layer in profile.layers:
        bits = shown[layer.name]
        macs[bits.activation] += layer.macs  # type: ignore[index]
        if bits.weight is not None:
            parameters[bits.weight] += layer.parameters  # type: ignore[index]
    whole = sum(parameters.values()) or 1, sum(macs.values()) or 1
    return tuple(Share(bits, 100 * parameters[bits] / whole[0], 100 * macs[bits] / whole[1]) for bits in WIDTHS)


def sums(findings: Findings) -> dict[str, Any] | None:
    """Averages, size, BitOps and predicted latency of the chosen plan; None without a plan or a profile of its layers."""
    if findings.chosen is None or findings.profile is None:
        return None
    return summarize_plan(findings.chosen, findings.profile, findings.latencies)
