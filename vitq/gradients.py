"""Losses whose second derivative is known from first ones, and the gradients that layers see under them.

A *probe* is a random scalar of the network's output z, image by image, whose gradient v satisfies E[v v^T] = H, the Gauss-Newton
Hessian of the loss in z. For any change d of a value inside, E[(g . d)^2] = d^T (J^T H J) d with g the probe's gradient there, so one
backward pass prices every change.

Classifiers: the loss is KL(float || quantized) of the softmax, and H the Fisher information, diag(p) - p p^T. With signs e_k = +-1,

    v = sum_k e_k sqrt(p_k) grad log p_k,        E[v v^T] = sum_k p_k grad log p_k grad log p_k^T = H,

to which every class contributes, where one sampled label would leave most images of a confident model without a gradient. The signs e may
be turned by any orthogonal matrix Q. The one that is taken makes the terms of v orthogonal to each other: its columns are eigenvectors of
the Gram matrix of the vectors sqrt(p_k) grad log p_k, the likeliest ones, and

    (g . d)^2 = sum_j (a_j . J d)^2 + (products of different a_j, of random sign),        a_j orthogonal, sum_j a_j a_j^T = H

has noise only in the products: none where two classes compete, which is where most of the loss is made. A *pair* of probes shares a draw:
the second one's signs are the first one's times +, -, +, - ... along the axes a_j, the largest first. In the mean of both, products of axes
of unequal parity cancel, that of the two largest among them, which is where most of the noise is; three competing classes have none.
Other networks: the loss is half the squared relative error of the output, H = I / |z|^2 and v = e / |z|.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook

from vitq.artifacts import Layer
from vitq.graph import Graph, run
from vitq.graph.run import Intercept

Probe = Callable[[Tensor, torch.Generator], Tensor]
"""From the output (B, ...) and a source of randomness to one scalar an image (B,), or to several (P, B) whose costs are averaged."""


_LIKELIEST = 32  # classes whose terms are made orthogonal; beyond, little probability is left


def fisher_probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The probe of a classifier's logits (B, ..., K): sum_k (Q e)_k sqrt(p_k) log p_k, p_k and Q held constant."""
    return fisher_pair(logits, generator)[0]


def fisher_pair(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The pair of probes of a classifier's logits (B, ..., K): (2, B)."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.detach().exp()
    return (p.sqrt() * _turned(_signs(logits, generator), p) * log_p).flatten(2).sum(2)


def _turned(signs: Tensor, p: Tensor) -> Tensor:
    """Q e of both probes (2, ..., K), with Q as in the module's equations for the `_LIKELIEST` classes and the identity for the others."""
    likeliest = p.topk(min(_LIKELIEST, p.shape[-1]), sorted=True).indices
    some = p.double().gather(-1, likeliest)
    root = some.sqrt()
    overlap = torch.diag_embed(torch.ones_like(some)) - some[..., None] - some[..., None, :] + p.double().square().sum(-1)[..., None, None]
    _, axes = torch.linalg.eigh(root[..., None] * overlap * root[..., None, :])
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    axes = axes * largest.sign()  # an eigenvector's sign is the solver's choice
    along = signs.double().gather(-1, likeliest)
    both = torch.stack([along, along * _alternating(along).flip(-1)])  # eigenvalues ascend: the last axis is the largest
    turned = (axes @ both[..., None])[..., 0]
    return torch.stack([signs, signs * _alternating(signs)]).scatter(-1, likeliest.expand(2, *likeliest.shape), turned.to(signs))


def _alternating(like: Tensor) -> Tensor:
    """+, -, +, - ... along the last axis."""
    return (1 - 2 * (torch.arange(like.shape[-1], device=like.device) % 2)).to(like)


def error_probe(output: Tensor, generator: torch.Generator) -> Tensor:
    """The probe of a backbone's output (B, ...): sum_i e_i z_i / |z|, |z| held constant."""
    return error_pair(output, generator)[0]


def error_pair(output: Tensor, generator: torch.Generator) -> Tensor:
    """The pair of probes of a backbone's output (B, ...): (2, B); its axes are those of the output, all alike."""
    flat = output.float().flatten(1)
    norm = flat.detach().norm(dim=1).clamp(min=1e-12)
    signs = _signs(flat, generator)
    return (flat * torch.stack([signs, signs * _alternating(signs)])).sum(2) / norm


def probe_for(num_classes: int) -> Probe:
    """The probe that fits a model: Fisher for classifiers, relative error for backbones (`num_classes` 0)."""
    return fisher_probe if num_classes > 0 else error_probe


def pair_for(num_classes: int) -> Probe:
    """The pair of probes that fits a model."""
    return fisher_pair if num_classes > 0 else error_pair


def loss(reference: Tensor, output: Tensor, num_classes: int) -> Tensor:
    """The loss itself, image by image (B,): KL(reference || output) in nats, or half the squared relative error."""
    reference, output = reference.double(), output.double()  # differences of 1e-6 nats are to be seen
    if num_classes > 0:
        log_p = reference.log_softmax(-1)
        return (log_p.exp() * (log_p - output.log_softmax(-1))).flatten(1).sum(1)
    error, norm = (value.flatten(1).norm(dim=1) for value in (output - reference, reference))
    return (error / norm.clamp(min=1e-12)).square() / 2


@dataclass(frozen=True)
class LayerTrace:
    """What one layer saw for a batch: its operands as it read them, and the probe's gradients at its output and at its inputs.

    `inputs` holds the activations (one, or a matmul's two) and `input_gradients` what changing them is worth through this layer alone;
    `gradient` is the output's. All have the images first where the layer keeps them first (windows: rows // images rows an image).
    `weight` is None for a matmul; `compute(x, weight)`, or `compute(a, b)`, is the layer's op without its bias.
    """

    layer: Layer
    inputs: tuple[Tensor, ...]
    input_gradients: tuple[Tensor, ...]
    gradient: Tensor
    compute: Callable[..., Tensor]
    weight: Tensor | None


def trace(
    graph: Graph,
    images: Tensor,
    probe: Probe,
    generator: torch.Generator,
    visit: Callable[[LayerTrace], None],
    finished: Callable[[], None] = lambda: None,
) -> None:
    """One forward pass over images (B, 3, H, W) and a backward pass a probe, which hands every layer's trace to `visit`, last layer first.

    A layer is visited as soon as its gradients are there and forgotten after the last backward pass; `finished` is called behind each.
    One that no gradient reaches is not visited.
    """
    waiting: dict[str, tuple[Tensor, list[Tensor], Callable[..., Tensor], Tensor | None]] = {}
    remaining = 0  # backward passes after the present one

    def arrive(layer: Layer, gradients: Sequence[Tensor | None]) -> None:
        # The hook itself holds no tensor: a cycle would outlive the pass.
        output, inputs, compute, weight = waiting[layer.name] if remaining else waiting.pop(layer.name)
        gradient, *input_gradients = (
            torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(gradients, (output, *inputs), strict=True)
        )
        visit(LayerTrace(layer, tuple(x.detach() for x in inputs), tuple(input_gradients), gradient, compute, weight))

    def watch(layer: Layer) -> Intercept:
        count = len(layer.activations)

        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            # An alias of each input: its gradient is that of this reader alone.
            inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in arguments[:count]]
            output = compute(*inputs, *arguments[count:])
            linear = _without_bias(compute, arguments[count:]) if layer.has_weight else compute
            waiting[layer.name] = output, inputs, linear, arguments[1] if layer.has_weight else None
            register_multi_grad_hook((output, *inputs), partial(arrive, layer))
            return output

        return intercept

    with torch.enable_grad():
        output = run(graph.module, images, {graph.nodes[layer.name]: watch(layer) for layer in graph.layers})
        probes = probe(output, generator).reshape(-1, len(output)).sum(1)
        for remaining in reversed(range(len(probes))):
            probes[-1 - remaining].backward(retain_graph=remaining > 0)
            finished()
    waiting.clear()


def _without_bias(compute: Callable[..., Tensor], rest: tuple[Any, ...]) -> Callable[..., Tensor]:
    """The layer's op as a function of input and weight alone, linear in each."""
    return lambda x, weight: compute(x, weight, None, *rest[2:])


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
