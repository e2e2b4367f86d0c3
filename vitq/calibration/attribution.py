"""What each layer's quantization does: how clean its output is, and its part of the KL divergence.

With y a layer's output in the float network, y^ what the quantized layer makes of the same inputs, both less their means over the batch,
which the bias puts right, and g a probe's gradient at that output (gradients.py), image by image,

    SQNR = 10 log10(sum y^2 / sum (y^ - y)^2)   [decibels]        KL = 1/2 mean (sum g (y^ - y))^2   [nats per image]

The second is the default metric (importance/output_fisher.py) of the codes and scales that were really chosen. Summed over the layers it
is about what the whole model loses: errors of different layers are independent, nearly.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.artifacts import Layer
from vitq.checkpoint import Checkpoint
from vitq.gradients import LayerTrace, Probe, pair_for, trace
from vitq.ranges import Batches

IMAGES = 64
"""Enough to tell which layers hurt."""


@dataclass(frozen=True)
class LayerError:
    """SQNR of a layer's output in decibels, None where nothing of the error or of the signal is left, and its KL in nats per image."""

    sqnr: float | None
    kl: float


def attribute(checkpoint: Checkpoint, batches: Batches, seed: int = 0, probe: Probe | None = None) -> dict[str, LayerError]:
    """The error of every layer, by name; nothing of a checkpoint that was loaded from a file, whose float weights are gone.

    Args:
        checkpoint: what a recipe has just made.
        batches: images; the first `IMAGES` of them, in whole batches, go through once forward and twice backward.
        seed: of the probe.
        probe: another one than that which fits the model.
    """
    if checkpoint.floats is None:
        return {}
    sums = {layer.name: torch.zeros(3, dtype=torch.float64) for layer in checkpoint.floats.layers}  # of y^2, of d^2, of u^2
    generator, taken, count = torch.Generator().manual_seed(seed), 0, 0  # count: images times probes

    probe = probe or pair_for(checkpoint.plan.model.num_classes)
    for images, _ in batches:
        taken += len(images)

        def visit(traced: LayerTrace, count: int = len(images)) -> None:
            with torch.no_grad():
                output, changed = _outputs(checkpoint, traced)
                error = changed - output
                u = (traced.gradient * error).reshape(count, -1).sum(1)
                sums[traced.layer.name] += torch.stack([value.double().square().sum() for value in (output, error, u)]).cpu()

        def end(images: int = len(images)) -> None:
            nonlocal count
            count += images

        trace(checkpoint.floats, images, probe, generator, visit, end)
        if taken >= IMAGES:
            break
    return {name: _error(found.tolist(), count) for name, found in sums.items()}


def _outputs(checkpoint: Checkpoint, traced: LayerTrace) -> tuple[Tensor, Tensor]:
    """The layer's output, float and quantized, without its mean over the batch and all tokens."""
    layer = traced.layer
    read = [
        checkpoint.activations[operand.tensor].quantize_dequantize(x) for operand, x in zip(layer.activations, traced.inputs, strict=True)
    ]
    if not layer.has_weight:
        return traced.compute(*traced.inputs), traced.compute(*read)
    pairs = (traced.inputs[0], traced.weight), (read[0], checkpoint.weights[layer.name].dequantize())
    output, changed = (_centred(layer, traced.compute(x, weight)) for x, weight in pairs)
    return output, changed


def _centred(layer: Layer, output: Tensor) -> Tensor:
    axis = output.dim() - 1 if layer.op == "linear" else 1
    return output - output.mean([other for other in range(output.dim()) if other != axis], keepdim=True)


def _error(sums: list[float], count: int) -> LayerError:
    signal, error, squares = sums
    return LayerError(10 * math.log10(signal / error) if signal > 0 and error > 0 else None, 0.5 * squares / max(count, 1))
