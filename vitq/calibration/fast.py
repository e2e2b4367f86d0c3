"""Recipe `fast`: minutes, no gradients.

LayerNorms folded to common channel ranges; weights per output channel and activations per tensor with least-squares ranges, below 8 bits
softmax outputs by squares row by row; weights rounded so that they make up for their inputs' errors and their own (absorbing.py); then
every output channel gets back the mean and the spread that it has in the float network (matching.py).
"""

from collections.abc import Mapping

from vitq.artifacts import BitPlan
from vitq.calibration.absorbing import absorb
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.matching import match_moments
from vitq.checkpoint import Checkpoint
from vitq.fitting import fit_operand
from vitq.graph import Graph
from vitq.ranges import Batches, Histogram, fold


def calibrate_fast(graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False, progress: Progress | None = None) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images; gone through four times.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    return fit_fast(*fold(graph, batches), plan, batches, symmetric, progress)


def fit_fast(
    folded: Graph,
    histograms: Mapping[str, Histogram],
    plan: BitPlan,
    batches: Batches,
    symmetric: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """The recipe from the folded graph on, which does not depend on the plan: one fold serves many plans.

    Args:
        folded: the folded graph (`ranges.fold`).
        histograms: of its activations, by `Operand.tensor`.
        plan: bits of every layer.
        batches: the calibration images; gone through twice.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.
    """
    bits = plan.bits
    activations = {
        operand.tensor: fit_operand(histograms[operand.tensor], bits[layer.name].activation_bits, operand.role)
        for layer in folded.layers
        for operand in layer.activations
    }
    of_weights = {name: found.weight_bits for name, found in bits.items() if found.weight_bits is not None}
    weights = absorb(folded, activations, of_weights, batches, symmetric, progress)
    weights, biases = match_moments(folded, activations, weights, batches)
    return assemble(folded, plan, weights, activations, biases)
