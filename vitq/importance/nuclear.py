"""VT-PTQ's module-wise metric (Liu et al., NeurIPS 2021): the nuclear norm of what a module computes, times the error of its weights.

    cost(l, b) = |M|_* |W_l - W^_l|_F^2

|M|_*, the sum of the singular values, is of an attention module's map after the softmax (mean over heads, windows and images), of an MLP's
output (tokens x channels, mean over images). A module is the attention, or the MLP, of a block, and all its layers share the norm; layers
that belong to neither are modules of their own and give their output.

Differs from the paper: it allocates along a Pareto front over whole modules; here the norms weight the layers' own errors. Inputs are
priced as if their relative error were the weight's; for a matmul the right operand stands for the weight. Norms are taken of
the first 8 images of each batch: singular values cost more than the network.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitq.artifacts import CostTable, Layer
from vitq.graph import run
from vitq.graph.run import Intercept
from vitq.importance.costs import table
from vitq.importance.quantizers import Quantizers, layer_weight
from vitq.importance.subject import Subject

_IMAGES = 8  # of each batch
_ATTENTION = {"qkv", "q", "k", "v", "kv", "qk", "av", "proj"}
_MLP = {"fc1", "fc2"}


def nuclear(subject: Subject) -> CostTable:
    """Prices every layer by the nuclear norm of its module's map and its own squared error; costs that rank ("relative")."""
    norms, powers = module_norms(subject)
    quantizers = Quantizers.of(subject, subject.bits)
    weight, activation = {}, {}
    for layer in subject.graph.layers:
        norm = norms[module_of(layer)]
        power = float(layer_weight(subject, layer).square().sum()) if layer.has_weight else powers[layer.name]
        errors = [quantizers.relative_errors(subject, layer, width) for width in subject.bits]
        weight[layer.name] = [norm * power * error for error, _ in errors]
        activation[layer.name] = [norm * power * error for _, error in errors]
    return table(subject, "relative", weight, activation)


def module_of(layer: Layer) -> str:
    """The name of the module that a layer belongs to."""
    kind = "attention" if layer.type in _ATTENTION else "mlp" if layer.type in _MLP else ""
    return f"{layer.block} {kind}" if kind else layer.name


def module_norms(subject: Subject) -> tuple[dict[str, float], dict[str, float]]:
    """The mean nuclear norm of each module by its name, and of each matmul the mean power of an image's right operand by layer name."""
    graph = subject.graph
    norms: dict[str, list[float]] = {}
    powers: dict[str, float] = {}
    shown = _shown(graph.layers)
    count = 0

    def watch(layer: Layer, images: int) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            output = compute(*arguments)
            if not layer.has_weight:
                powers[layer.name] = powers.get(layer.name, 0.0) + float(arguments[1].double().square().sum())
            if layer.name in shown:
                maps = _attention_map(layer, arguments) if layer.type == "av" else _feature_map(layer, output, images)
                norms.setdefault(module_of(layer), []).append(float(torch.linalg.svdvals(maps.float()).sum(-1).mean()))
            return output

        return intercept

    for batch, _ in subject.batches:
        images = batch[:_IMAGES]
        with torch.no_grad():
            run(graph.module, images, {graph.nodes[layer.name]: watch(layer, len(images)) for layer in graph.layers})
        count += len(images)
    means = {name: sum(found) / len(found) for name, found in norms.items()}
    return means, {name: power / max(count, 1) for name, power in powers.items()}


def _shown(layers: tuple[Layer, ...]) -> set[str]:
    """The layers whose map stands for their module: attention's `av`, an MLP's `fc2`, else (and where those are missing) all of them."""
    shown = set()
    for module in {module_of(layer) for layer in layers}:
        members = [layer for layer in layers if module_of(layer) == module]
        chosen = [layer for layer in members if layer.type in ("av", "fc2")] or members
        shown |= {layer.name for layer in chosen}
    return shown


def _attention_map(layer: Layer, arguments: tuple[Any, ...]) -> Tensor:
    """The operand that comes from the softmax, (..., queries, keys)."""
    return next((x for x, operand in zip(arguments, layer.operands, strict=False) if operand.role == "post_softmax"), arguments[0])


def _feature_map(layer: Layer, output: Tensor, images: int) -> Tensor:
    """(images, everything between, channels)."""
    last = output if layer.op != "convolution" else output.movedim(1, -1)
    return last.reshape(images, -1, last.shape[-1])
