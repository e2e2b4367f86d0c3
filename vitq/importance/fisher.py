"""Traces of the Fisher information (the Gauss-Newton matrix), by operand: mean over the images of squared gradients.

For a probe whose gradient at the output has the second moment H (gradients.py), the gradient G_n that image n gives an operand has
E |G_n|^2 = tr(J_n^T H J_n), the trace of the operand's own block. Gradients of a batch are never summed before they are squared.

The gradient of a linear's weight is G_n = g_n^T X_n, with X_n its inputs (T, C) and g_n the gradient at its output (T, O). The squared
norm comes from the products that are cheaper: G_n itself, T O C multiplications, or <X_n X_n^T, g_n g_n^T>, T^2 (O + C), which makes no
gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vitq.gradients import LayerTrace, Probe, trace
from vitq.importance.subject import Subject


def operand_traces(subject: Subject, probe_of: Callable[[Tensor | None], Probe]) -> dict[str, tuple[float, float]]:
    """The trace by each of a layer's two operands, in the order of `Layer.operands`, by layer name.

    Args:
        subject: the graph and its images; gone through once, forward and backward.
        probe_of: the probe of a batch, from its labels (B,) or None.
    """
    totals = {layer.name: (0.0, 0.0) for layer in subject.graph.layers}
    generator = torch.Generator().manual_seed(subject.seed)
    count = visited = 0
    for images, labels in subject.batches:
        visited = 0

        def add(traced: LayerTrace, count: int = len(images), before: int = count) -> None:
            nonlocal visited
            subject.progress(before + count * visited / len(totals))
            visited += 1
            left, right = totals[traced.layer.name]
            first, second = (float(norms.double().sum()) for norms in squared_gradients(traced, count))
            totals[traced.layer.name] = left + first, right + second

        trace(subject.graph, images, probe_of(labels), generator, add)
        count += len(images)
    return {name: (left / max(count, 1), right / max(count, 1)) for name, (left, right) in totals.items()}


def squared_gradients(traced: LayerTrace, images: int) -> tuple[Tensor, Tensor]:
    """The squared norm of each image's gradient by each of the layer's two operands, twice (images,)."""
    inputs = [gradient.reshape(images, -1).square().sum(1) for gradient in traced.input_gradients]
    if not traced.layer.has_weight:
        return inputs[0], inputs[1]
    return inputs[0], (_of_linear if traced.layer.op == "linear" else _of_convolution)(traced, images)


def _of_linear(traced: LayerTrace, images: int) -> Tensor:
    x, g = (value.reshape(images, -1, value.shape[-1]) for value in (traced.inputs[0], traced.gradient))
    tokens, inputs, outputs = x.shape[1], x.shape[2], g.shape[2]
    if tokens * (inputs + outputs) < inputs * outputs:
        return ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
    return torch.stack([(one.mT @ other).square().sum() for one, other in zip(g, x, strict=True)])


def _of_convolution(traced: LayerTrace, images: int) -> Tensor:
    """One image at a time; an image may lie in several rows."""
    assert traced.weight is not None
    norms = []
    rows = len(traced.gradient) // images
    for x, g in zip(traced.inputs[0].split(rows), traced.gradient.split(rows), strict=True):
        with torch.enable_grad():
            weight = traced.weight.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(traced.compute(x, weight), weight, g)
        norms.append(gradient.square().sum())
    return torch.stack(norms)
