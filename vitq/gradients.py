"""Losses whose second derivative is known from first ones, and the gradients that layers see under them.

A *probe* is a random scalar of the network's output z, image by image, whose gradient v satisfies E[v v^T] = H, the Gauss-Newton
Hessian of the loss in z. For any change d of a value inside, E[(g . d)^2] = d^T (J^T H J) d with g the probe's gradient there, so one
backward pass prices every change.

Classifiers: the loss is KL(float || quantized) of the softmax, and H the Fisher information, diag(p) - p p^T. With signs e_k = +-1,

    v = sum_k e_k sqrt(p_k) grad log p_k,        E[v v^T] = sum_k p_k grad log p_k grad log p_k^T = H,

to which every class contributes, where one sampled label would leave most images of a confident model without a gradient.
Other networks: the loss is half the squared relative error of the output, H = I / |z|^2 and v = e / |z|.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitq.artifacts import Layer
from vitq.graph import Graph, run
from vitq.graph.run import Intercept

Probe = Callable[[Tensor, torch.Generator], Tensor]
"""From the output (B, ...) and a source of randomness to one scalar an image (B,)."""


def fisher_probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The probe of a classifier's logits (B, K): sum_k e_k sqrt(p_k) log p_k, p_k held constant."""
    log_p = logits.float().log_softmax(-1)
    weights = log_p.detach().exp().sqrt() * _signs(logits, generator)
    return (weights * log_p).flatten(1).sum(1)


def error_probe(output: Tensor, generator: torch.Generator) -> Tensor:
    """The probe of a backbone's output (B, ...): sum_i e_i z_i / |z|, |z| held constant."""
    flat = output.float().flatten(1)
    norm = flat.detach().norm(dim=1).clamp(min=1e-12)
    return (flat * _signs(flat, generator)).sum(1) / norm


def probe_for(num_classes: int) -> Probe:
    """The probe that fits a model: Fisher for classifiers, relative error for backbones (`num_classes` 0)."""
    return fisher_probe if num_classes > 0 else error_probe


@dataclass(frozen=True)
class LayerTrace:
    """What one layer saw for a batch: its operands as it read them, and the probe's gradient at its output.

    `inputs` holds the activations (one, or a matmul's two), `gradient` the output's gradient, images first where the layer keeps
    them first. `groups` is how many leading rows an image has (windows), so that rows // groups counts images.
    """

    layer: Layer
    inputs: tuple[Tensor, ...]
    gradient: Tensor
    compute: Callable[..., Tensor]
    weight: Tensor | None


def trace(graph: Graph, images: Tensor, probe: Probe, generator: torch.Generator) -> Iterator[LayerTrace]:
    """One forward and one backward pass over images (B, 3, H, W); yields every layer's trace, last layer first, freeing as it goes."""
    seen: dict[str, tuple[tuple[Tensor, ...], Tensor, Callable[..., Tensor], Tensor | None]] = {}

    def watch(layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            output = compute(*arguments)
            if not output.requires_grad:
                output.requires_grad_()
            count = len(layer.activations)
            rest = arguments[count:]
            bound = _without_bias(compute, rest) if layer.has_weight else compute
            weight = arguments[1] if layer.has_weight else None
            seen[layer.name] = (tuple(argument.detach() for argument in arguments[:count]), output, bound, weight)
            return output

        return intercept

    intercepts: Mapping[str, Intercept] = {graph.nodes[layer.name]: watch(layer) for layer in graph.layers}
    with torch.enable_grad():
        output = run(graph.module, images, intercepts)
        names = [layer.name for layer in graph.layers if layer.name in seen]
        gradients = torch.autograd.grad(probe(output, generator).sum(), [seen[name][1] for name in names], allow_unused=True)
    by_name = dict(zip(names, gradients, strict=True))
    for layer in reversed(graph.layers):
        inputs, value, compute, weight = seen.pop(layer.name)
        gradient = by_name.pop(layer.name)
        yield LayerTrace(layer, inputs, torch.zeros_like(value) if gradient is None else gradient, compute, weight)


def _without_bias(compute: Callable[..., Tensor], rest: tuple[Any, ...]) -> Callable[..., Tensor]:
    """The layer's op as a function of input and weight alone, linear in each."""
    return lambda x, weight: compute(x, weight, None, *rest[2:])


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
