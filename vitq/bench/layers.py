"""A model's latency layer by layer, measured here, before any plan is calibrated: what `--budget latency=4.0ms` is reckoned with.

    layer at its widths  =  median of the layer as a file of its own  -  median of a file without ops
    rest                 =  median of the whole model at 8 bits       -  the sum of its layers at 8 bits

All files run in turn. A layer is timed once for each kind (equal ops and shapes) and each form that its widths take in onnxruntime: integer
kernels compute in 8 bits whatever the width, so the weight's width does not matter, and an activation below 8 bits costs a Clip. A
latency budget therefore moves little between the widths; it is above all a promise that is checked. The whole model with all
activations below 8 bits is measured too and tells how well the sum predicts.

Left out: a tensor that several layers read is quantized once in a real file, but counted with each of them; the rest evens that out at
8 bits. Files that were measured alone find their weights in the cache more often than within a model; that is in the rest too.
"""

from importlib.metadata import version

from vitq import __version__
from vitq.artifacts import WIDTHS, Bits, ModelSpec
from vitq.bench.compare import noise
from vitq.bench.latency import call, interleaved
from vitq.errors import InputError
from vitq.export.timing import LayerFile, nothing, timing_files
from vitq.graph import Graph, capture
from vitq.latency import LatencyTable, Timing
from vitq.models import build
from vitq.processor import processor
from vitq.rewrites import fold_layernorms, rewrite
from vitq.runtime import open_session

FORMS: dict[Bits, tuple[Bits, ...]] = {8: (8,), 4: (2, 3, 4, 5, 6, 7)}
"""The activation widths that are measured, and those that each stands for."""


def latency_table(spec: ModelSpec, batch: int, threads: int, rounds: int | None = None) -> LatencyTable:
    """Measures a model's layers and what is left beside them.

    Args:
        spec: the model; its weights do not matter and are not read.
        batch: images a run.
        threads: of each run, at least 1.
        rounds: timed runs of each file; None for as many as `latency.SECONDS` allow.

    Returns:
        The table; its `made_from["whole_ms"]` has the whole model's measured and predicted milliseconds by width.

    Raises:
        InputError: this torch and timm build another graph than the profile has, or one that cannot be exported.
    """
    graph = graph_of(spec)
    forms: dict[Bits, tuple[bytes, list[LayerFile]]] = {bits: timing_files(graph, spec, bits) for bits in FORMS}
    runs = [call(open_session(nothing(), threads), [noise((1,))])]
    for whole, alone in forms.values():
        runs.append(call(open_session(whole, threads), [noise((batch, *graph.input_shape))]))
        runs += [
            call(open_session(file.content, threads), [noise((batch * shape[0], *shape[1:])) for shape in file.shapes]) for file in alone
        ]
    medians = iter([found.median_ms for found in interleaved(runs, rounds)])
    overhead = next(medians)
    wholes: dict[Bits, float] = {}
    timings: dict[Bits, list[Timing]] = {}
    for bits, (_, alone) in forms.items():
        wholes[bits] = next(medians)
        timings[bits] = [_timing(file, graph, FORMS[bits], max(0.0, next(medians) - overhead)) for file in alone]
    sums = {bits: sum(timing.ms * len(timing.layers) for timing in found) for bits, found in timings.items()}
    rest = wholes[8] - sums[8]
    checked = {str(bits): {"measured": round(wholes[bits], 6), "predicted": round(rest + sums[bits], 6)} for bits in forms}
    return LatencyTable(
        architecture=spec.architecture,
        graph_digest=spec.graph_digest,
        batch=batch,
        threads=threads,
        rest_ms=round(rest, 6),
        timings=tuple(timing for found in timings.values() for timing in found),
        made_from={"processor": processor().name, "versions": _versions(), "whole_ms": checked},
    )


def graph_of(spec: ModelSpec) -> Graph:
    """The graph that is exported of a model, with random weights. Raises InputError where it is not the one of the profile."""
    channels, height, width = spec.data_config["input_size"]
    graph = rewrite(capture(build(spec.architecture, spec.arguments, spec.num_classes), (channels, height, width)))
    if graph.digest != spec.graph_digest:
        raise InputError(
            f"the profile was made for another graph of {spec.architecture}; run `vitq profile` again with this torch and timm"
        )
    return fold_layernorms(graph)


def _timing(file: LayerFile, graph: Graph, activation_bits: tuple[Bits, ...], ms: float) -> Timing:
    weighted = next(layer.has_weight for layer in graph.layers if layer.name == file.layers[0])
    return Timing(layers=file.layers, weight_bits=WIDTHS if weighted else None, activation_bits=activation_bits, ms=round(ms, 6))


def _versions() -> dict[str, str]:
    return {"vitq": __version__} | {package: version(package) for package in ("onnxruntime", "torch", "timm")}
