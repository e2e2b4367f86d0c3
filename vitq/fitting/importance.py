"""Histograms in which a value counts as much as an error in it is worth: ranges then minimise the error of the network's output.

For an error d of a tensor, the loss rises by d^T F d / 2, F the Fisher information by that tensor. Its diagonal is E[g_i^2], g the
gradient of a probe (gradients.py), and a histogram of the values weighted with g_i^2 is all that a search needs:

    sum_i g_i^2 (x_i - x^_i)^2

After PTQ4ViT (Yuan et al., ECCV 2022, Hessian guided metric), which APHQ-ViT and FIMA-Q carry on.
Differs from the papers: they weigh errors of the layer's output and run the layer on each candidate. Here those of its input are weighed,
with the gradient there, which knows the weight already; one pass serves all quantizers at all widths.
"""

import torch

from vitq.gradients import LayerTrace, Probe, trace
from vitq.graph import Graph
from vitq.ranges import Batches, Histogram, add


def importance_histograms(graph: Graph, batches: Batches, probe: Probe, seed: int = 0) -> dict[str, Histogram]:
    """A histogram of every activation that a layer reads, by `Operand.tensor`, weighted with squared gradients.

    Where several layers read a tensor, it counts what its values are worth to each.

    Args:
        graph: the graph.
        batches: the calibration images; gone through once, forward and backward.
        probe: the random scalar of the output (`gradients.probe_for`).
        seed: of the probe.
    """
    found: dict[str, Histogram] = {}
    generator = torch.Generator().manual_seed(seed)

    def visit(traced: LayerTrace) -> None:
        for operand, x, gradient in zip(traced.layer.activations, traced.inputs, traced.input_gradients, strict=True):
            found[operand.tensor] = add(found.get(operand.tensor), x, gradient.square())

    for images, _ in batches:
        trace(graph, images, probe, generator, visit)
    return found
