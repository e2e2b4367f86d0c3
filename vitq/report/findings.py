"""The values that a report is made of: what a run folder holds, whatever part of the chain that is."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitq.artifacts import BitPlan, Profile, Staircase
from vitq.latency import LatencyTable

Percent = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0)]


class Result(BaseModel):
    """A saved result: closed against nonsense, open for what later versions add."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


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


class Evaluated(Result):
    """One artifact's entry in evaluate.json: means over `num_images` images, and the half widths of their 95 % intervals.

    Percent, percentage points (`top1_change`, against the float model) and nats per image (`kl`); None where it was not measured.
    """

    num_images: int = Field(ge=1)
    top1: Percent | None = None
    top5: Percent | None = None
    top1_change: float | None = None
    top1_change_margin: float | None = None
    agreement: Percent | None = None
    kl: float | None = None
    kl_margin: float | None = None
    cosine: float | None = None
    relative_error: float | None = None


class Timed(Result):
    """One file at one batch size in bench.json, in milliseconds a run."""

    name: str
    batch: int = Field(ge=1)
    threads: int
    median_ms: Positive
    p90_ms: Positive
    images_per_second: float
    speedup: float


class Loaded(Result):
    """What loading a file took, in bench.json."""

    name: str
    file_bytes: int
    load_ms: float
    peak_memory_bytes: int | None = None


class Benchmark(Result):
    """bench.json."""

    results: tuple[Timed, ...]
    files: tuple[Loaded, ...] = ()


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
