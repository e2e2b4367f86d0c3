"""Layer importance by relevance propagation (LRP-QViT, arXiv 2401.11243): what the output owes to each layer.

With R_l(x) the relevance at the output of layer l for image x (relevance/),

    c_l(x) = sum over the layer's output of |R_l(x)|,        I_l = mean_x c_l(x) / sum_k c_k(x),        cost(l, b) = I_l 4^-b.

`lrp_aggregate`: "abs" as above; "positive" sums only what is above 0; "signed" takes |sum R|. Rules that conserve relevance make the signed
sums of a branch equal (fc1 and fc2; qkv, av and proj nearly so), so that they rank branches, not the layers within. `lrp_target`: the
relevance starts at the logit of the predicted class, or of the image's label; a backbone has none, and there it starts at every output in
proportion to its square: what is explained is the squared norm.

Differs from the paper: it names neither rules nor aggregation nor the number of images; these are our choices.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from vitq.artifacts import CostTable
from vitq.errors import InputError
from vitq.graph import Graph
from vitq.importance.costs import by_width
from vitq.importance.relevance import RULES, Rules, propagate
from vitq.importance.relevance.step import image_axis, sum_per_image
from vitq.importance.subject import MetricOptions, Subject

_IMAGES_AT_ONCE = 8  # whose values are held together

_log = logging.getLogger("vitq")


def lrp(subject: Subject) -> CostTable:
    """Prices every layer by its share of the relevance.

    Returns:
        `importance` holds I_l, 0 or more, of sum 1; costs are I_l 4^-b, unit "relative".

    Raises:
        InputError: labels are asked for and the images have none, or no relevance reaches a layer.
    """
    options, rules = subject.options, RULES[subject.options.lrp_rules]
    layers = [layer.name for layer in subject.graph.layers]
    total, without_rule, done = torch.zeros(len(layers), dtype=torch.float64), set[str](), 0
    for images, labels in _parts(subject):
        subject.progress(done)
        done += len(images)
        start = partial(start_at, labels=labels, num_classes=subject.num_classes, target=options.lrp_target)
        scores, unknown = layer_scores(subject.graph, images, start, rules, options)
        if new := sorted(unknown - without_rule):
            _log.warning("lrp: these ops have no rule of their own and take the epsilon rule: %s", ", ".join(new))
        without_rule |= unknown
        whole = scores.sum(1, keepdim=True)
        total += torch.where(whole > 0, scores / whole, 0.0).sum(0)
    if not (bool(total.isfinite().all()) and float(total.sum()) > 0):
        raise InputError(
            f"the {options.lrp_rules} rules with aggregate {options.lrp_aggregate} leave no finite relevance at any layer; "
            "use the rules chefer and the aggregate abs, or another metric"
        )
    return by_width(subject, dict(zip(layers, (total / total.sum()).tolist(), strict=True)))


def start_at(output: Tensor, labels: Tensor | None, num_classes: int, target: str) -> Tensor:
    """Where relevance starts, sum 1 an image.

    Args:
        output: (B, num_classes) logits, or (B, ...) features of a backbone.
        labels: (B,) or None.
        num_classes: 0 for a backbone, whose outputs z get z^2 / |z|^2.
        target: "pred" (the largest logit) or "label".

    Raises:
        InputError: there are no labels, or one is no class of the model.
    """
    if target == "label":
        if num_classes == 0 or labels is None:
            lacking = "a model without classes" if num_classes == 0 else "images without labels"
            raise InputError(f"lrp target 'label' cannot be used with {lacking}; use 'pred', or images in one folder a class")
        if foreign := [label for label in labels.tolist() if not 0 <= label < num_classes]:
            raise InputError(f"label {foreign[0]} is none of the model's {num_classes} classes; give images of its own classes")
        return torch.nn.functional.one_hot(labels.to(output.device), output.shape[-1]).to(output)
    if num_classes > 0:
        return torch.nn.functional.one_hot(output.argmax(-1), output.shape[-1]).to(output)
    squared = output.square()
    return squared / squared.flatten(1).sum(1).clamp(min=1e-30).reshape(-1, *[1] * (output.dim() - 1))


def layer_scores(
    graph: Graph, images: Tensor, start: Callable[[Tensor], Tensor], rules: Rules, options: MetricOptions
) -> tuple[Tensor, frozenset[str]]:
    """c_l of each image and layer, float64 (B, layers), and the ops that have no rule of their own."""
    column = {graph.nodes[layer.name]: index for index, layer in enumerate(graph.layers)}
    one_image = {node.name: node.meta["val"].shape for node in graph.module.graph.nodes if node.name in column}
    scores = torch.zeros(len(images), len(column), dtype=torch.float64)

    def visit(name: str, relevance: Tensor) -> None:
        if name in column:
            axis = image_axis(relevance.shape, one_image[name], len(images))
            counted = AGGREGATES[options.lrp_aggregate](relevance.double())
            scores[:, column[name]] = sum_per_image(counted, len(images), axis).abs().cpu()

    return scores, propagate(graph, images, start, rules, visit).without_rule


AGGREGATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "positive": lambda relevance: relevance.clamp(min=0),
    "signed": lambda relevance: relevance,
}
"""What of a layer's relevance is summed."""


def _parts(subject: Subject) -> Iterator[tuple[Tensor, Tensor | None]]:
    for images, labels in subject.batches:
        for first in range(0, len(images), _IMAGES_AT_ONCE):
            part = slice(first, first + _IMAGES_AT_ONCE)
            yield images[part], None if labels is None else labels[part]
