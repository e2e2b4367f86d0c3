"""Latency of ONNX files in onnxruntime on the CPU, measured side by side, and the float32 file to compare them with.

A run of one file is followed by a run of the next, round after round, so that whatever else the machine does falls on all alike.
Threads wait without spinning: a thread that spins for one session's next run takes the core from another session's. Medians are given.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from vitq.artifacts import write_whole
from vitq.errors import InputError
from vitq.graph import Graph

OPSET = 21


@dataclass(frozen=True)
class Latency:
    """Milliseconds a run: the median, and what nine runs in ten stay below."""

    median_ms: float
    p90_ms: float


def latencies(files: Sequence[Path], images: Tensor, rounds: int = 100, warmup: int = 10, threads: int = 0) -> list[Latency]:
    """Times each file on the same images.

    Args:
        files: ONNX files with one input of the images' shape.
        images: (B, 3, H, W), float32.
        rounds: timed runs of each file.
        warmup: runs of each file before these.
        threads: of each run; 0 for one a core.

    Raises:
        InputError: a file is missing, or onnxruntime cannot load it.
    """
    sessions = [_session(file, threads) for file in files]
    feeds = [{session.get_inputs()[0].name: np.ascontiguousarray(images.numpy())} for session in sessions]
    milliseconds: list[list[float]] = [[] for _ in files]
    for turn in range(-warmup, rounds):
        for session, feed, measured in zip(sessions, feeds, milliseconds, strict=True):
            started = time.perf_counter()
            session.run(None, feed)
            if turn >= 0:
                measured.append(1000 * (time.perf_counter() - started))
    return [Latency(median(measured), float(np.quantile(measured, 0.9))) for measured in milliseconds]


def export_float(graph: Graph, path: Path) -> None:
    """Writes a graph as it is, in float32, by torch's own exporter: opset 21, dynamic batch, input `images`, output `output`.

    Raises:
        InputError: torch.onnx cannot express some op of the graph.
    """
    example = torch.zeros(2, *graph.input_shape)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(graph.module, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                verbose=False,
                input_names=["images"],
                output_names=["output"],
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise InputError(
            f"torch.onnx cannot express this model at opset {OPSET}: {reason}; there is no float32 file to compare with"
        ) from None
    assert exported is not None
    write_whole(path, lambda temporary: exported.save(temporary, external_data=False))


def _session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    if not file.is_file():
        raise InputError(f"{file} does not exist; `vitq export` writes it")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exception types are not public
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{file} cannot be loaded by onnxruntime: {reason}; `vitq export` writes a new one") from None
