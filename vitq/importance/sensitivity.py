"""Quantization sensitivity (Mix-QViT, arXiv 2501.06357): each layer quantized alone, and the loss measured.

With M the mean loss over the images, layer l's operands at b bits and all other layers at a baseline,

    S_{l,b} = M(l at b bits, the others at the baseline) - M(all at the baseline)

made to fall with the width by isotonic regression and then clamped at 0. The quantizers are those that `calibrate` fits, and the layer's
output gets back the mean and the spread that each channel has in the float network, as in calibration/matching.py but from the batch at
hand. The baseline's layers are corrected likewise, once a batch, in a network where all of them are at the baseline.

Nothing is run twice: for each batch the baseline network runs once and the values at the start of every block are kept, so that a layer in
block i costs the blocks from i on. Results go to the journal (journal.py) line by line, and a killed run goes on from there.

Differs from the paper: it does not give the loss, the baseline or the way of smoothing; methods and options here are ours. The cost of a
layer is measured with both operands quantized, and is split between weight and input as their own relative errors are.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitq.artifacts import CostTable, Layer
from vitq.choices import BASELINES
from vitq.errors import InputError, UsageError
from vitq.gradients import loss as divergence
from vitq.graph import advance, run, start
from vitq.graph.run import Intercept
from vitq.importance.costs import split, table
from vitq.importance.journal import Journal
from vitq.importance.quantizers import Quantizers
from vitq.importance.subject import Subject
from vitq.moments import Moments, corrected, correction
from vitq.units import counted

_UNITS: dict[str, Literal["nats", "accuracy", "relative"]] = {"kl": "nats", "top1": "accuracy", "cross-entropy": "relative"}


def sensitivity(subject: Subject) -> CostTable:
    """Prices every layer at every width by the loss that it adds to the baseline network.

    Returns:
        With the loss "kl" nats per image (for backbones half the squared relative error), with "top1" points, with "cross-entropy" nats
        that can fall below zero and so count as "relative". At the baseline's own width the cost is 0.

    Raises:
        UsageError: an unknown baseline, or a loss that the model has no classifier for.
        InputError: labels are needed and the images have none, or one that is not among the classes.
    """
    loss, baseline = subject.options.sensitivity_loss, _baseline_bits(subject.options.sensitivity_baseline)
    changes = [(layer, width) for layer in subject.graph.layers for width in subject.bits if width != baseline]
    quantizers = Quantizers.of(subject, {*subject.bits, *([baseline] if baseline else [])})
    with Journal(subject.journal, _header(subject) if subject.journal else {}) as journal:
        found = loss_increases(subject, quantizers, changes, baseline, (loss,), journal).mean
    tied = {layer.name: [float(found.get((layer.name, width), np.zeros(1))[0]) for width in subject.bits] for layer in subject.graph.layers}
    weight, activation = split(subject, tied, _weight_shares(subject, quantizers))
    return table(subject, _UNITS[loss], weight, activation, tied)


@dataclass(frozen=True)
class Increases:
    """By (layer name, width) the mean increase of each loss over the baseline's, (losses,); and over how many images."""

    mean: dict[tuple[str, int], np.ndarray]
    num_images: int


def loss_increases(
    subject: Subject,
    quantizers: Quantizers,
    changes: Sequence[tuple[Layer, int]],
    baseline: int | None,
    losses: Sequence[str],
    journal: Journal,
) -> Increases:
    """How much quantizing one layer alone adds to losses.

    Args:
        subject: the graph and its images.
        quantizers: of the baseline's width and the changes'.
        changes: layers and the width that their operands get, one at a time.
        baseline: the width of all other layers; None leaves them float.
        losses: of "kl", "cross-entropy" and "top1" (percent wrong; a label that is no class of the model is wrong too).
        journal: where results are kept as they come.

    Raises:
        UsageError: a loss that the model has no classifier for.
        InputError: labels are needed and the images have none, or one that is not among the classes.
    """
    at_baseline = np.zeros(len(losses))
    totals = {(layer.name, width): np.zeros(len(losses)) for layer, width in changes}
    count = 0
    for index, (images, labels) in enumerate(subject.batches):
        for loss in losses:
            if loss != "kl":
                required_labels(subject, labels, f"the loss {loss}", "the loss kl", among_classes=loss == "cross-entropy")
        batch = _Batch(subject, quantizers, baseline, losses, images, labels)
        at_baseline += journal.result({"batch": index, "images": _digest(images, labels)}, batch.at_baseline)
        for done, (layer, width) in enumerate(changes):
            subject.progress(count + len(images) * done / len(changes))
            key = {"batch": index, "layer": layer.name, "bits": width}
            totals[layer.name, width] += journal.result(key, lambda layer=layer, width=width, batch=batch: batch.changed(layer, width))
        count += len(images)
    return Increases({change: (total - at_baseline) / max(count, 1) for change, total in totals.items()}, count)


@dataclass
class _Batch:
    """One batch of images in the float network and in the baseline network; both run when a result is first needed."""

    subject: Subject
    quantizers: Quantizers
    baseline: int | None
    losses: Sequence[str]
    images: Tensor
    labels: Tensor | None

    def at_baseline(self) -> list[float]:
        """The losses of the baseline network, summed over the images."""
        return self._losses(self._in_baseline.output)

    def changed(self, layer: Layer, bits: int) -> list[float]:
        """The losses with one layer at another width, summed over the images."""
        graph, state = self.subject.graph, self._in_baseline
        intercepts = {**state.intercepts, graph.nodes[layer.name]: self._alone(layer, bits)}
        (block,) = (block for block in graph.blocks if block.name == layer.block)
        with torch.no_grad():
            return self._losses(advance(graph.module, state.at_blocks[block.name], block.first, None, intercepts)["output"])

    @cached_property
    def _in_float(self) -> "_FloatRun":
        """The float network's output, and of each weighted layer's output the mean and standard deviation of every channel."""
        graph, wanted = self.subject.graph, {}

        def watch(layer: Layer) -> Intercept:
            def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
                output = compute(*arguments)
                wanted[layer.name] = Moments.of(layer, output)
                return output

            return intercept

        with torch.no_grad():
            watched = {graph.nodes[layer.name]: watch(layer) for layer in graph.layers if layer.has_weight}
            return _FloatRun(run(graph.module, self.images, watched), wanted)

    @cached_property
    def _in_baseline(self) -> "_BaselineRun":
        graph = self.subject.graph
        fitted: dict[str, tuple[Tensor, Tensor]] = {}
        first: dict[str, Intercept] = {}
        later: dict[str, Intercept] = {}
        if self.baseline is not None:
            first = {graph.nodes[layer.name]: self._alone(layer, self.baseline, fitted) for layer in graph.layers}
            later = {graph.nodes[layer.name]: self._fixed(layer, self.baseline, fitted) for layer in graph.layers}
        values = start(graph.module, self.images)
        at_blocks: dict[str, dict[str, Any]] = {}
        with torch.no_grad():
            for block, (begin, stop) in zip(graph.blocks, graph.stretches, strict=True):
                at_blocks[block.name] = values
                values = advance(graph.module, values, begin, stop, first)
        return _BaselineRun(values["output"], at_blocks, later)

    def _alone(self, layer: Layer, bits: int, fitted: dict[str, tuple[Tensor, Tensor]] | None = None) -> Intercept:
        """A layer quantized, each output channel given the float network's mean and spread; into `fitted` go its weight and bias."""
        wanted = self._in_float.moments

        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            output = self.quantizers.output(layer, compute, arguments, bits, bits)
            if not layer.has_weight:
                return output
            gain, bias = correction(wanted[layer.name], Moments.of(layer, output))
            if fitted is not None:
                weight = self.quantizers.weights[layer.name, bits].dequantize()
                fitted[layer.name] = weight * gain.to(weight).reshape(-1, *[1] * (weight.dim() - 1)), bias.to(weight)
            return corrected(layer, output, gain, bias)

        return intercept

    def _fixed(self, layer: Layer, bits: int, fitted: Mapping[str, tuple[Tensor, Tensor]]) -> Intercept:
        """A layer of the baseline as it was fitted."""

        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            read = self.quantizers.read(layer, arguments, bits)
            return compute(*read, *fitted[layer.name], *arguments[3:]) if layer.has_weight else compute(*read)

        return intercept

    def _losses(self, output: Tensor) -> list[float]:
        expected, output = self._in_float.output.double(), output.double()
        labels = None if self.labels is None else self.labels.to(output.device)
        return [float(_per_image(loss, output, expected, labels, self.subject.num_classes).sum()) for loss in self.losses]


@dataclass(frozen=True)
class _FloatRun:
    output: Tensor
    moments: Mapping[str, Moments]


@dataclass(frozen=True)
class _BaselineRun:
    """The output, the values alive at the start of each block by its name, and how later runs compute a layer of the baseline."""

    output: Tensor
    at_blocks: Mapping[str, dict[str, Any]]
    intercepts: Mapping[str, Intercept]


def _per_image(loss: str, output: Tensor, expected: Tensor, labels: Tensor | None, num_classes: int) -> Tensor:
    """The loss of each image, float64 (B,)."""
    if loss == "kl":
        return divergence(expected, output, num_classes)
    assert labels is not None
    if loss == "cross-entropy":
        return -output.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return 100.0 * (output.argmax(1) != labels).double()


def _weight_shares(subject: Subject, quantizers: Quantizers) -> dict[str, float]:
    """The part of each layer's cost that falls to its weight: its relative error's part of both operands', over all widths."""
    shares = {}
    for layer in subject.graph.layers:
        errors = np.array([quantizers.relative_errors(subject, layer, width) for width in subject.bits]).sum(0)
        shares[layer.name] = float(errors[0] / errors.sum()) if errors.sum() > 0 else 0.5
    return shares


def _baseline_bits(baseline: str) -> int | None:
    """The width of the layers that stay: None for "fp32"."""
    if baseline not in BASELINES:
        raise UsageError(f"sensitivity baseline {baseline!r} is not known; give fp32, w8a8 or uniform K with K from 2 to 8")
    return BASELINES[baseline]


def required_labels(subject: Subject, labels: Tensor | None, wanted_by: str, instead: str, among_classes: bool = True) -> Tensor:
    """The labels of a batch, int64 (B,), which `wanted_by` cannot do without; `instead` is what can.

    Raises:
        UsageError: the model has no classifier.
        InputError: there are no labels, or, with `among_classes`, one is no class of the model.
    """
    if subject.num_classes == 0:
        raise UsageError(f"{wanted_by} needs a classifier and the model has none (num_classes 0); give {instead}")
    if labels is None:
        raise InputError(f"{wanted_by} needs labels and the images have none; give a folder of class folders, or {instead}")
    if among_classes and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < subject.num_classes:
        found = f"labels {int(labels.min())} to {int(labels.max())}, the model {counted(subject.num_classes, 'class')}"
        raise InputError(f"{wanted_by} cannot be used: the images have {found}; give the model's own images, or {instead}")
    return labels


def _header(subject: Subject) -> dict[str, Any]:
    """What the results depend on."""
    histograms = sorted(subject.histograms.items())
    weights = hashlib.sha256()
    for name, value in sorted(subject.graph.module.state_dict().items()):
        weights.update(name.encode() + value.cpu().numpy().tobytes())
    ranges = hashlib.sha256()
    for tensor, found in histograms:
        ranges.update(f"{tensor} {found.low!r} {found.high!r}".encode() + found.counts.numpy(force=True).tobytes())
    return {
        "metric": "sensitivity",
        "graph": subject.graph.digest,
        "weights": weights.hexdigest(),
        "histograms": ranges.hexdigest(),
        "rounding": "compensated" if subject.covariances else "nearest",
        "loss": subject.options.sensitivity_loss,
        "baseline": subject.options.sensitivity_baseline,
        "bits": list(subject.bits),
        "seed": subject.seed,
    }


def _digest(images: Tensor, labels: Tensor | None) -> str:
    content = images.cpu().numpy().tobytes() + (b"" if labels is None else labels.cpu().numpy().tobytes())
    return hashlib.sha256(content).hexdigest()
