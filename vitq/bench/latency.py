"""Latency of ONNX files in onnxruntime on the CPU, measured side by side.

A run of one file is followed by a run of the next, round after round, so that whatever else the machine does falls on all alike.
Threads wait without spinning: a thread that spins for one session's next run takes the core from another session's. Medians are given.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from torch import Tensor

from vitq.errors import InputError
from vitq.runtime import open_session

SECONDS = 10.0
"""How long each file is measured where the number of rounds is left open."""
FEWEST, MOST = 20, 200
"""The bounds of that number."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds a run: the median, and what nine runs in ten stay below."""

    median_ms: float
    p90_ms: float


def latencies(files: Sequence[Path], images: Tensor, rounds: int | None = 100, warmup: int = 10, threads: int = 0) -> list[Latency]:
    """Times each file on the same images.

    Args:
        files: ONNX files with one input of the images' shape.
        images: (B, 3, H, W), float32.
        rounds: timed runs of each file; None for as many as `interleaved` finds time for.
        warmup: runs of each file before these.
        threads: of each run; 0 for one a core.

    Raises:
        InputError: a file is missing, or onnxruntime cannot load it.
    """
    sessions = [open_session(file, threads) for file in files]
    array = np.ascontiguousarray(images.numpy())
    return interleaved([call(session, [array]) for session in sessions], rounds, warmup)


def interleaved(
    calls: Sequence[Callable[[], Any]], rounds: int | None = None, warmup: int = 5, progress: Callable[[int, int], None] | None = None
) -> list[Latency]:
    """Times calls in turn, one of each a round.

    Args:
        calls: what to time.
        rounds: timed rounds; None for so many that they take `SECONDS` a call, from `FEWEST` to `MOST`.
        warmup: rounds before these, at least 1.
        progress: called between the rounds with (rounds done, all of them).
    """
    milliseconds: list[list[float]] = [[] for _ in calls]
    for _ in range(warmup):
        started = time.perf_counter()
        for timed in calls:
            timed()
        seconds = time.perf_counter() - started
    if rounds is None:
        rounds = max(FEWEST, min(MOST, round(SECONDS * len(calls) / max(seconds, 1e-9))))
    for done in range(rounds):
        if progress:
            progress(done, rounds)
        for timed, measured in zip(calls, milliseconds, strict=True):
            started = time.perf_counter()
            timed()
            measured.append(1000 * (time.perf_counter() - started))
    return [Latency(median(measured), float(np.quantile(measured, 0.9))) for measured in milliseconds]


def call(session: onnxruntime.InferenceSession, arrays: Sequence[np.ndarray]) -> Callable[[], Any]:
    """One run of a session on its inputs, in their order."""
    feed = {given.name: array for given, array in zip(session.get_inputs(), arrays, strict=True)}
    return lambda: session.run(None, feed)


def input_shape(session: onnxruntime.InferenceSession, file: str, batch: int) -> tuple[int, ...]:
    """The shape of a file's images at a batch size.

    Raises:
        InputError: the file has another number of inputs than one, of another type than float32, or of sizes that do not fit.
    """
    inputs = [(given.type, given.shape) for given in session.get_inputs()]
    types, shapes = [kind for kind, _ in inputs], [shape for _, shape in inputs]
    if types != ["tensor(float)"] or not shapes[0] or not all(isinstance(size, int) for size in shapes[0][1:]):
        raise InputError(f"{file} takes {inputs}; `vitq bench` runs files with one float32 input of (batch, 3, height, width)")
    first, *others = shapes[0]
    if isinstance(first, int) and first != batch:
        raise InputError(f"{file} takes batches of {first} only; give --batch {first}, or export it with a dynamic batch")
    return (batch, *others)
