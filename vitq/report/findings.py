"""The values that a report is made of: what a run folder holds, whatever part of the chain that is."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vitq.artifacts import BitPlan, Profile, Staircase
from vitq.artifacts.results import Benchmark, Evaluated, Result
from vitq.latency import LatencyTable


class Asked(Result):
    """What was asked of `allocate`, as a plan remembers it."""

    budgets: tuple[str, ...] = ()
    uniform: str | None = None
    metric: str | None = None
    objective: str | None = None
    gamma: float | None = None
    bits: tuple[int, ...] = ()
    bits_apart: bool = False
    fixed: tuple[str, ...] = ()


def asked(plan: BitPlan | None) -> Asked | None:
    """What was asked of `allocate` for a plan; None where it does not say, or says what cannot be."""
    try:
        return Asked.model_validate(plan.made_from["allocation"]) if plan else None
    except (KeyError, ValidationError):
        return None


@dataclass(frozen=True)
class File:
    """A file of the run folder: its size in bytes, its sha256, and the `made_from` that it carries."""

    name: str
    bytes: int
    sha256: str
    made_from: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bars:
    """A histogram: how many values lie in each of equal bins from `low` to `high`."""

    low: float
    high: float
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """One tensor of a layer before and after folding; `levels` are the values that its quantizer has, none for a weight."""

    title: str
    before: Bars
    after: Bars
    levels: tuple[float, ...] = ()


@dataclass(frozen=True)
class CloseUp:
    """A layer's weight and inputs."""

    layer: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Findings:
    """What a run folder holds; None or empty where it holds none.

    `folder` is its path as it was given, `option` what a command needs to find it (" --run-dir somewhere", or nothing). `plan` is
    plan.json, `calibrated` the plan in model.safetensors, `exported` the metadata of model.onnx, by names without "vitq.". `errors` are
    the layers' "sqnr" in decibels and "kl" in nats per image. `remarks` say what does not fit together. `num_images` were looked at for
    `close_ups`; `close_up_lacks` is why there are none, or no inputs in them.
    """

    folder: str
    option: str = ""
    files: tuple[File, ...] = ()
    profile: Profile | None = None
    plan: BitPlan | None = None
    staircase: Staircase | None = None
    calibrated: BitPlan | None = None
    errors: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    exported: Mapping[str, Any] | None = None
    evaluations: Mapping[str, Evaluated] = field(default_factory=dict)
    benchmark: Benchmark | None = None
    latencies: LatencyTable | None = None
    close_ups: tuple[CloseUp, ...] = ()
    close_up_lacks: str = ""
    num_images: int = 0
    remarks: tuple[str, ...] = ()

    def file(self, name: str) -> File | None:
        """The file of this name."""
        return next((file for file in self.files if file.name == name), None)

    def quoted(self, name: str) -> str:
        """The path of a file of this name in the folder, as a shell takes it."""
        return shlex.quote(str(Path(self.folder) / name))

    @property
    def chosen(self) -> BitPlan | None:
        """The plan that the report speaks of: the one that was calibrated, since errors and accuracy are its own, else plan.json."""
        return self.calibrated or self.plan


@dataclass(frozen=True)
class Lacking:
    """In place of a part of the report: the command that brings what it needs, and what is in the way, where that says more."""

    command: str
    why: str = ""
