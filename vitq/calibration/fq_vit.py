"""Recipe `fq-vit`: power-of-two factors behind LayerNorms, log2 behind softmax (FQ-ViT, Lin et al., IJCAI 2022).

What a linear reads of a LayerNorm has one scale and zero point, from its extremes, and in each channel a factor of 1, 2, 4 or 8 with the
least squared error (fitting/factors.py); softmax outputs are the powers 1, 1/2, 1/4, ...; all else has equal steps from extreme to extreme,
weights for each output channel. The float network's values are fitted to, no LayerNorm is folded.

Differs from the paper: its factors are for the LayerNorm's input, here for its output, since in vitq's plans layers' operands have
widths, and LayerNorm and softmax themselves stay float; the paper quantizes to 8 bits and softmax to 4. The authors' code has weights
without zero points at every width, and one range for queries, keys and values; here weights of 7 and 8 bits have no zero point and no
integer beyond 64 (vitq/affine.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitq.affine import quantize_weight, weight_qparams
from vitq.artifacts import BitPlan, Layer
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.ticks import tick
from vitq.checkpoint import Checkpoint
from vitq.fitting.factors import channel_errors, power_of_two_factor
from vitq.fitting.uniform import fit_min_max
from vitq.graph import Graph, run, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.graph.run import Intercept
from vitq.quantizers import Log2, Quantizer
from vitq.ranges import Batches, Histogram, histograms
from vitq.rewrites import fold_factors


def calibrate_fq_vit(
    graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images; gone through twice.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    same = fold_factors(graph, {})  # the structure that a checkpoint has
    found = histograms(same, batches)
    bits = {operand.tensor: plan.bits[layer.name].activation_bits for layer in same.layers for operand in layer.activations}
    activations: dict[str, Quantizer] = {tensor: fit_min_max(found[tensor], width) for tensor, width in bits.items()}
    roles = {operand.tensor: operand.role for layer in same.layers for operand in layer.activations}
    activations |= {tensor: Log2(1.0, bits[tensor]) for tensor, role in roles.items() if role == "post_softmax"}
    weights, told = {}, tick(progress, len(same.layers), "weights")
    for layer in same.layers:
        told()
        if (width := plan.bits[layer.name].weight_bits) is not None:
            weight = tensor_of(same.module, operand_nodes(same.layer_node(layer.name))[1])
            rows = weight.flatten(1)
            weights[layer.name] = quantize_weight(weight, *weight_qparams(rows.amin(1), rows.amax(1), width, symmetric), width)
    return assemble(same, plan, weights, activations | _factors(same, bits, found, batches))


def _factors(graph: Graph, bits: dict[str, int], ranges: dict[str, Histogram], batches: Batches) -> dict[str, Quantizer]:
    """The quantizers of LayerNorm outputs that linears alone read, whose last axis is thus the channels'."""
    readers: dict[str, list[Layer]] = {}
    for layer in graph.layers:
        for operand in layer.activations:
            readers.setdefault(operand.tensor, []).append(layer)
    errors: dict[str, Tensor] = {}

    def watch(tensor: str) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            new = channel_errors(arguments[0], *ranges[tensor].occupied, bits[tensor])
            errors[tensor] = errors[tensor] + new if tensor in errors else new
            return compute(*arguments)

        return intercept

    watched = {
        graph.nodes[some[0].name]: watch(tensor)
        for tensor, some in readers.items()
        if some[0].operands[0].role == "post_layernorm" and all(layer.op == "linear" for layer in some)
    }
    with torch.no_grad():
        for images, _ in batches:
            run(graph.module, images, watched)
    return {tensor: power_of_two_factor(*ranges[tensor].occupied, bits[tensor], sums) for tensor, sums in errors.items()}
