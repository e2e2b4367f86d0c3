"""Metrics: what each layer's bits are worth. One file each, one line of `METRICS` each, all answering with the same cost table."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from vitq.artifacts import WIDTHS, CostTable, Profile
from vitq.errors import UsageError
from vitq.fitting import observe
from vitq.graph import Graph
from vitq.images import Images
from vitq.importance.controls import random, uniform
from vitq.importance.fisher_trace import fisher_trace
from vitq.importance.hawq_v2 import hawq_v2
from vitq.importance.lampq import lampq
from vitq.importance.lrp import lrp
from vitq.importance.mix_qvit import mix_qvit
from vitq.importance.nuclear import nuclear
from vitq.importance.output_fisher import output_fisher
from vitq.importance.sensitivity import sensitivity
from vitq.importance.sqnr import sqnr
from vitq.importance.subject import MetricOptions, Subject
from vitq.importance.weight_mse import weight_mse
from vitq.models import LoadedModel
from vitq.rewrites import prepare

__all__ = ["METRICS", "MetricOptions", "Subject", "profile"]

METRICS: dict[str, Callable[[Subject], CostTable]] = {
    "output-fisher": output_fisher,
    "sensitivity": sensitivity,
    "lrp": lrp,
    "mix-qvit": mix_qvit,
    "lampq": lampq,
    "fisher-trace": fisher_trace,
    "hawq-v2": hawq_v2,
    "sqnr": sqnr,
    "weight-mse": weight_mse,
    "nuclear": nuclear,
    "uniform": uniform,
    "random": random,
}


def profile(
    model: LoadedModel,
    images: Images,
    metrics: Sequence[str] = ("output-fisher",),
    bits: Sequence[int] = WIDTHS,
    seed: int = 0,
    device: str = "cpu",
    options: MetricOptions | None = None,
    journal: str | Path | None = None,
    progress: Callable[[float, float, str], None] | None = None,
) -> Profile:
    """Prices every layer of a model at every width.

    Args:
        model: a float model.
        images: calibration images, preprocessed for the model; labels are used by what `options` asks for, and by lampq.
        metrics: names in `METRICS`; all are stored, the first is the allocator's default.
        bits: the widths to price, 2 to 8.
        seed: of whatever a metric draws at random.
        device: where to compute.
        options: choices of single metrics.
        journal: where a metric that takes long keeps its results as they come; a second run goes on from there.
        progress: is told by a metric that works long on a batch (images done, all of them, what is done), between `images.progress`.

    Raises:
        UsageError: an unknown metric or width.
        InputError: the model cannot be captured, or the images cannot be used.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise UsageError(f"metric {unknown[0]!r} is not known; give one of {', '.join(METRICS)}")
    widths = sorted(set(bits))
    if not widths or not set(widths) <= set(WIDTHS):
        raise UsageError(f"bits {','.join(map(str, bits)) or 'none'} cannot be priced; give widths from 2 to 8, such as 2,3,4,8")
    graph, spec = prepare(model, device)
    folded, histograms, covariances = observe(graph, images)
    kept_in = None if journal is None else Path(journal)
    chosen = options or MetricOptions()
    subject = Subject(folded, histograms, images, tuple(widths), spec.num_classes, seed, chosen, kept_in, covariances)
    costs = {}
    for name in metrics:
        told = partial(_tell, progress, images.num_listed, name)
        costs[name] = METRICS[name](replace(subject, progress=told))
    return Profile(
        model=spec,
        layers=folded.layers,
        costs=costs,
        rest_bytes=rest_bytes(folded),
        made_from={
            "model": {"source": model.source, "digest": model.digest},
            "images": {"source": images.source, "digest": images.digest, "num_images": images.num_listed},
            "seed": seed,
            "unfused_attention": graph.unfused(),
            "versions": {name: version(name) for name in ("torch", "timm")},
        },
    )


def _tell(progress: Callable[[float, float, str], None] | None, whole: int, name: str, done: float) -> None:
    if progress:
        progress(done, whole, name)


def rest_bytes(graph: Graph) -> int:
    """The predicted bytes of an exported file outside its layers: float tensors, equal ones once, and the ops between the layers."""
    weights = {layer.operands[1].tensor for layer in graph.layers if layer.has_weight}
    rest = [value for name, value in graph.module.state_dict().items() if name not in weights]
    stored = {(tuple(value.shape), hashlib.sha256(value.cpu().numpy().tobytes()).digest()): value.nbytes for value in rest}
    ops = sum(node.op == "call_function" for node in graph.module.graph.nodes) - len(graph.layers)
    return sum(stored.values()) + ops * _BYTES_PER_OP + _BYTES_OF_A_FILE


# Measured on exported files: docs/log.md.
_BYTES_PER_OP = 34
_BYTES_OF_A_FILE = 900
