"""Recipe `fast`: minutes, no gradients.

LayerNorms folded to common channel ranges; weights per output channel and activations per tensor with least-squares ranges, softmax
outputs by their logarithm where that is better; weights rounded so that later columns make up for earlier ones' errors; then every
output channel gets back the mean and the spread that it has in the float network (matching.py).
"""

from collections.abc import Mapping

from torch import Tensor

from vitq.artifacts import BitPlan
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.matching import match_moments
from vitq.calibration.ticks import tick
from vitq.checkpoint import Checkpoint
from vitq.fitting import fit_operand, fit_weights, observe
from vitq.graph import Graph
from vitq.ranges import Batches, Histogram


def calibrate_fast(graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False, progress: Progress | None = None) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images; gone through three times.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    return fit_fast(*observe(graph, batches), plan, batches, symmetric, progress)


def fit_fast(
    folded: Graph,
    histograms: Mapping[str, Histogram],
    covariances: Mapping[str, Tensor],
    plan: BitPlan,
    batches: Batches,
    symmetric: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """The recipe from the folded graph on, which does not depend on the plan: one fold serves many plans.

    Args:
        folded: the folded graph (`fitting.observe`).
        histograms: of its activations, by `Operand.tensor`.
        covariances: of its linears' inputs, by layer name (`input_covariances`).
        plan: bits of every layer.
        batches: the calibration images; gone through once.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.
    """
    bits = plan.bits
    activations = {
        operand.tensor: fit_operand(histograms[operand.tensor], bits[layer.name].activation_bits, operand.role)
        for layer in folded.layers
        for operand in layer.activations
    }
    weights, told = {}, tick(progress, len(folded.layers), "weights")
    for layer in folded.layers:
        if (width := bits[layer.name].weight_bits) is not None:
            weights[layer.name] = fit_weights(folded, covariances, layer.name, [width], symmetric)[0]
        told()
    weights, biases = match_moments(folded, activations, weights, batches)
    return assemble(folded, plan, weights, activations, biases)
