"""A model's latency layer by layer, measured here, before any plan is calibrated: what `--budget latency=4.0ms` is reckoned with.

    alone                    =  median of the layer as a file of its own  -  median of a file without ops
    layer at 8 bits          =  alone at 8 bits
    rest                     =  median of the whole model at 8 bits  -  the sum of its layers
    layer below 8 bits       =  layer at 8 bits + r max(0, alone below 8 bits - alone at 8 bits)
    r                        :  the rest and all layers below 8 bits sum to the median of that whole model

All files run in turn. A layer is timed once for each kind (equal ops and shapes) and each form that its widths take in onnxruntime: integer
kernels compute in 8 bits whatever the width, so the weight's width does not matter, and an activation below 8 bits costs a Clip, a softmax
its rows' own units. A latency budget therefore moves little between the widths; it is above all a promise that is checked. Layers that were
measured alone say how the price of narrow activations is shared out, whole models how high it is: alone it comes out far too high, since
a tensor that several layers read is quantized once in a real file, and there a softmax is not computed before its roots are. A
third model, every other block of it below 8 bits, tells how well the sums predict.
"""

from importlib.metadata import version

import numpy as np

from vitq import __version__
from vitq.artifacts import WIDTHS, Bits, ModelSpec
from vitq.bench.compare import Progress, noise
from vitq.bench.latency import call, interleaved
from vitq.errors import InputError
from vitq.graph import Graph, capture
from vitq.latency import LatencyTable, Timing
from vitq.models import build
from vitq.onnx_file.timing import LayerFile, made_up, nothing, timing_files, whole_file
from vitq.processor import processor
from vitq.rewrites import fold_layernorms, rewrite
from vitq.runtime import open_session

WIDE: Bits = 8
NARROW: Bits = 4
FORMS: dict[Bits, tuple[Bits, ...]] = {WIDE: (8,), NARROW: (2, 3, 4, 5, 6, 7)}
"""The activation widths that are measured, and those that each stands for."""


def latency_table(spec: ModelSpec, batch: int, threads: int, rounds: int | None = None, progress: Progress | None = None) -> LatencyTable:
    """Measures a model's layers and what is left beside them.

    Args:
        spec: the model; its weights do not matter and are not read.
        batch: images a run.
        threads: of each run, at least 1.
        rounds: timed runs of each file; None for as many as `latency.SECONDS` allow.
        progress: called with (rounds done, all of them, what is done).

    Returns:
        The table; its `made_from["whole_ms"]` has the milliseconds of whole models: at 8 bits and below, as measured, and of the one whose
        every other block is below, measured and predicted.

    Raises:
        InputError: this torch and timm build another graph than the profile has, or one that cannot be exported.
    """
    graph = graph_of(spec)
    forms = timing_files(graph, spec, FORMS)
    mixed = every_other_block_narrow(graph)
    wholes = [forms[WIDE][0], forms[NARROW][0], whole_file(made_up(graph, spec, mixed))]
    runs = [call(open_session(nothing(), threads), [noise((1,))])]
    runs += [call(open_session(whole, threads), [noise((batch, *graph.input_shape))]) for whole in wholes]
    runs += [
        call(open_session(file.content, threads), [noise((batch * shape[0], *shape[1:])) for shape in file.shapes])
        for _, alone in forms.values()
        for file in alone
    ]

    def told(done: int, whole: int) -> None:
        if progress:
            progress(done, whole, f"{len(runs)} files")

    overhead, wide, narrow, measured, *medians = (found.median_ms for found in interleaved(runs, rounds, progress=told))
    kinds = forms[WIDE][1]
    at_wide, at_narrow = (np.maximum(0, np.array(part) - overhead) for part in (medians[: len(kinds)], medians[len(kinds) :]))
    counts = np.array([len(file.layers) for file in kinds])
    at_narrow = at_wide + shared_out(narrow - wide, at_narrow - at_wide, counts)
    rest = wide - float(counts @ at_wide)
    milliseconds: dict[Bits, np.ndarray] = {WIDE: at_wide, NARROW: np.maximum(0, at_narrow)}
    of_layer = {(name, bits): float(ms[at]) for bits, ms in milliseconds.items() for at, file in enumerate(kinds) for name in file.layers}
    predicted = rest + sum(of_layer[name, bits] for name, bits in mixed.items())
    return LatencyTable(
        architecture=spec.architecture,
        graph_digest=spec.graph_digest,
        batch=batch,
        threads=threads,
        rest_ms=round(rest, 6),
        timings=tuple(
            _timing(file, graph, FORMS[bits], float(ms[at])) for bits, ms in milliseconds.items() for at, file in enumerate(kinds)
        ),
        made_from={
            "processor": processor().name,
            "versions": _versions(),
            "whole_ms": {
                "8": round(wide, 6),
                "below": round(narrow, 6),
                "mixed": {"measured": round(measured, 6), "predicted": round(predicted, 6)},
            },
        },
    )


def shared_out(extra: float, alone: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """What each kind of layer takes more below 8 bits, (kinds,), in the proportions that they show alone.

    Args:
        extra: what the whole model takes more.
        alone: what each kind takes more as a file of its own, (kinds,); where it is less, that is noise, and counts as none.
        counts: layers of each kind, (kinds,).
    """
    alone = np.maximum(0, alone)
    total = float(counts @ alone)
    return alone * (extra / total) if total else np.zeros_like(alone)


def every_other_block_narrow(graph: Graph) -> dict[str, Bits]:
    """Activation widths by layer: those of every other block below 8 bits."""
    at = {block: index for index, block in enumerate(dict.fromkeys(layer.block for layer in graph.layers))}
    return {layer.name: NARROW if at[layer.block] % 2 else WIDE for layer in graph.layers}


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
