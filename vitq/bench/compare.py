"""Files against each other: a row a file and batch size, as `vitq bench` prints it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitq.bench.latency import call, input_shape, interleaved
from vitq.runtime import open_session

Progress = Callable[[float, float, str], None]
"""Is told the work done, all of it, and what is done."""


@dataclass(frozen=True)
class Row:
    """One file at one batch size; `speedup` is the first file's median over this one's, at the same batch size."""

    name: str
    batch: int
    threads: int
    median_ms: float
    p90_ms: float
    images_per_second: float
    speedup: float


def compare(
    files: Mapping[str, Path], batches: Sequence[int], threads: int, rounds: int | None = None, progress: Progress | None = None
) -> list[Row]:
    """Times all files in turn at one batch size after the other, on noise.

    Args:
        files: ONNX files by the names of their rows; each is fed images of its own size.
        batches: images a run.
        threads: of each run, at least 1.
        rounds: timed runs of each file at each batch size; None for as many as take `latency.SECONDS`.
        progress: called with (batch sizes done, all of them, what is done).

    Raises:
        InputError: a file is missing, cannot be loaded, or takes no such batch.
    """
    sessions = {name: open_session(file, threads) for name, file in files.items()}
    shapes = {(name, batch): input_shape(session, name, batch) for batch in batches for name, session in sessions.items()}
    rows: list[Row] = []
    for index, batch in enumerate(batches):

        def told(done: int, whole: int, at: int = index, batch: int = batch) -> None:
            if progress:
                progress(at + done / whole, len(batches), f"batch {batch}")

        # Latency does not depend on what is in a picture.
        calls = [call(session, [noise(shapes[name, batch])]) for name, session in sessions.items()]
        found = interleaved(calls, rounds, progress=told)
        for name, latency in zip(files, found, strict=True):
            median, first = latency.median_ms, found[0].median_ms
            rows.append(Row(name, batch, threads, median, latency.p90_ms, 1000 * batch / median, first / median))
    return rows


def noise(shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 numbers, the same for equal shapes."""
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
