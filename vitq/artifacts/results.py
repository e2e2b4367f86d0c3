"""What `vitq evaluate` and `vitq bench` leave in a run folder: evaluate.json, an `Evaluated` by artifact, and bench.json, a `Benchmark`."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Percent = Annotated[float, Field(ge=0, le=100)]
Positive = Annotated[float, Field(gt=0)]


class Result(BaseModel):
    """A saved result: closed against nonsense, open for what later versions add."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Evaluated(Result):
    """One artifact's entry in evaluate.json: means over `num_images` images, and the half widths of their 95 % intervals.

    `digest` is the sha256 of the file that was evaluated (of a MODEL, `LoadedModel.digest`); files of older versions have none.
    Percent, percentage points (`top1_change`, against the float model) and nats per image (`kl`); None where it was not measured.
    """

    num_images: int = Field(ge=1)
    digest: str | None = None
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
    """What loading a file took, in bench.json; `digest` is its sha256, which files of older versions lack."""

    name: str
    digest: str | None = None
    file_bytes: int
    load_ms: float
    peak_memory_bytes: int | None = None


class Benchmark(Result):
    """bench.json."""

    results: tuple[Timed, ...]
    files: tuple[Loaded, ...] = ()
