"""LampQ's type-aware Fisher metric (arXiv 2511.10004, section on sensitivity; methods after its equations for Omega and alpha).

    Omega_l = alpha_t tr(F_l)        tr(F_l) = E_x E_{y ~ p(y|x)} | d log p(y|x) / d W_l |_F^2        cost(l, b) = gamma^-b Omega_l

F_l is the Fisher information of the layer's weight, t the layer's type. The scale of a type turns its traces into a change of loss,

    alpha_t = A_t / mean tr        A_t: mean loss of accuracy,

both means over a few layers of the type, each quantized alone to 2 bits. So multiplying all traces of a type by a number changes no cost.
Traces come from exact per-image gradients (fisher.py).

Differs from the paper: it searches the linears of the blocks alone; here the types are those of all layers. A matmul has no weight, and
its two operands, with the gradients that they get, take the weight's place. A_t is the mean KL divergence with fewer than 1000 labelled
images, else the drop in top-1. The paper names neither gamma, nor the width, nor how many layers: 4, 2 bits and at most 4, evenly
spread in depth, are ours. A backbone's Fisher information is that of a Gaussian around its output, as wide as the output is long.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vitq.artifacts import CostTable, Layer
from vitq.gradients import Probe
from vitq.importance.costs import by_width
from vitq.importance.fisher import operand_traces
from vitq.importance.journal import Journal
from vitq.importance.quantizers import Quantizers
from vitq.importance.sensitivity import Increases, loss_increases, required_labels
from vitq.importance.subject import Subject

_PROBED_BITS = 2
_PROBED_LAYERS = 4  # of a type
_LEAST_LOSS = 1e-4  # of A_t: a type whose layers cost nothing still has an order
_ENOUGH_IMAGES = 1000  # to see a drop in top-1


def lampq(subject: Subject) -> CostTable:
    """Prices every layer by its type's scale times the trace of its Fisher information; half of a cost falls to the weight.

    Returns:
        Costs that rank ("relative"); `importance` is Omega.

    Raises:
        UsageError: the empirical Fisher of a model without a classifier.
        InputError: the empirical Fisher of images without labels, or with one that is not among the classes.
    """
    traces = fisher_traces(subject)
    scales = type_scales(subject.graph.layers, traces, _losses(subject))
    return by_width(subject, {layer.name: scales[layer.type] * traces[layer.name] for layer in subject.graph.layers})


def fisher_traces(subject: Subject) -> dict[str, float]:
    """The trace of the Fisher information of every layer's weight (of a matmul's operands), by layer name, mean over the images."""
    traces = operand_traces(subject, lambda labels: _probe(subject, labels))
    return {layer.name: traces[layer.name][1] if layer.has_weight else sum(traces[layer.name]) for layer in subject.graph.layers}


def type_scales(layers: Sequence[Layer], traces: Mapping[str, float], losses: Mapping[str, float]) -> dict[str, float]:
    """The alpha of each type: the mean loss over the mean trace of those of its layers that have an entry in `losses`."""
    scales = {}
    for kind in dict.fromkeys(layer.type for layer in layers):
        probed = [layer.name for layer in layers if layer.type == kind and layer.name in losses]
        mean_trace = float(np.mean([traces[name] for name in probed]))
        scales[kind] = max(float(np.mean([losses[name] for name in probed])), _LEAST_LOSS) / mean_trace if mean_trace > 0 else 0.0
    return scales


def probed_layers(layers: Sequence[Layer]) -> list[Layer]:
    """At most 4 layers of each type, each from the middle of an equal stretch of their order."""
    chosen = []
    for kind in dict.fromkeys(layer.type for layer in layers):
        alike = [layer for layer in layers if layer.type == kind]
        some = min(_PROBED_LAYERS, len(alike))
        chosen += [alike[(2 * position + 1) * len(alike) // (2 * some)] for position in range(some)]
    return chosen


def _losses(subject: Subject) -> dict[str, float]:
    """What quantizing each probed layer alone adds to the loss: points of top-1 with images enough to see them, else nats."""
    labelled = subject.num_classes > 0 and next(iter(subject.batches))[1] is not None
    changes = [(layer, _PROBED_BITS) for layer in probed_layers(subject.graph.layers)]
    with Journal(None, {}) as journal:
        quantizers = Quantizers.of(subject, [_PROBED_BITS])
        found = loss_increases(subject, quantizers, changes, None, ("kl", "top1") if labelled else ("kl",), journal)
    return {name: float(increase[_column(found, labelled)]) for (name, _), increase in found.mean.items()}


def _column(found: Increases, labelled: bool) -> int:
    return 1 if labelled and found.num_images >= _ENOUGH_IMAGES else 0


def _probe(subject: Subject, labels: Tensor | None) -> Probe:
    """The log-likelihood of a label for each image: sampled from the model, or the image's own."""
    if subject.options.fisher == "true":
        return _sampled_label if subject.num_classes > 0 else subject.probe
    known = required_labels(subject, labels, "the empirical Fisher", "fisher true")
    return lambda logits, _: _log_likelihood(logits, known)


def _sampled_label(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The log-likelihood log p(y) of one y ~ p for each image, (B,)."""
    return _log_likelihood(logits, torch.multinomial(logits.detach().float().softmax(1).cpu(), 1, generator=generator)[:, 0])


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.float().log_softmax(1).gather(1, labels.to(logits.device)[:, None])[:, 0]
