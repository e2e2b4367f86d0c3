"""Recipe `ptq4vit`: twin uniform ranges and errors weighted by gradients (PTQ4ViT, Yuan et al., ECCV 2022).

Softmax and GELU outputs have two step sizes (quantizers/twin_uniform.py), all else equal steps. An activation's parameters have the least
sum of squared errors, each weighted by the squared gradient of the loss at that value (fitting/importance.py), in the float network, all
layers in parallel. Weights have the ranges whose error of the layer's output is the least, on quantized inputs. No LayerNorm is folded.

Differs from the paper: gradients are taken where a layer reads, not where it writes, of a probe of the float network's output in place of
its task loss; weights' errors are not weighted, and have a scale for each output channel where the paper has one for each matrix; equal
steps have a zero point; see also fitting/twin.py and fitting/output_error.py.
"""

from torch import Tensor

from vitq.affine import QuantizedWeight
from vitq.artifacts import BitPlan
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.channelwise import fit_in_sequence
from vitq.checkpoint import Checkpoint
from vitq.fitting import FITS
from vitq.fitting.importance import importance_histograms
from vitq.fitting.output_error import weight_by_output
from vitq.gradients import probe_for
from vitq.graph import Graph
from vitq.quantizers import Quantizer
from vitq.ranges import Batches, histograms
from vitq.rewrites import fold_factors

_TWIN = {"post_softmax", "post_gelu"}


def calibrate_ptq4vit(
    graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images, 32 in the paper; gone through three times and held in memory.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    same = fold_factors(graph, {})  # the structure that a checkpoint has
    plain = histograms(same, batches)
    weighted = importance_histograms(same, batches, probe_for(plan.model.num_classes))
    activations: dict[str, Quantizer] = {}
    for layer in same.layers:
        for operand in layer.activations:
            found = weighted.get(operand.tensor, plain[operand.tensor])
            histogram = found if float(found.counts.sum()) > 0 else plain[operand.tensor]  # nothing that counts: every value does
            kind = "twin-uniform" if operand.role in _TWIN else "uniform"
            activations[operand.tensor] = FITS[kind](histogram, plan.bits[layer.name].activation_bits)

    def weigh(weight: Tensor, x: Tensor, bits: int) -> QuantizedWeight:
        rows = x.reshape(-1, x.shape[-1])
        return weight_by_output(weight, rows.T @ rows / len(rows), bits, symmetric)

    return assemble(same, plan, fit_in_sequence(same, plan, activations, batches, weigh, symmetric, progress), activations)
