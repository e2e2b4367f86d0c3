"""Recipe `adalog`: logarithms of a searched base behind softmax and GELU (AdaLog, Wu et al., ECCV 2024), without its block optimisation.

LayerNorm outputs are quantized channel by channel and folded (channelwise.py). Softmax outputs get the powers of a base 2^(q/37) with q
and the scale searched; GELU outputs the same above a shift, which a bias takes up; all else equal steps. Parameters have the least error
of the output of the layer that reads (fitting/output_error.py), weights too, each row its own.

Differs from the paper: queries, keys and values have one quantizer a tensor, not one a head; folded norms keep the ranges between
quantiles; each layer is fitted to what the quantized layers before it make, where the paper's reads the float network's; one round.
See also vitq/quantizers/adalog.py.
"""

from collections.abc import Callable

from torch import Tensor

from vitq.affine import QuantizedWeight
from vitq.artifacts import BitPlan, Operand
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.channelwise import fit_in_sequence, fold_channelwise
from vitq.checkpoint import Checkpoint
from vitq.fitting import FITS
from vitq.fitting.output_error import refined_by_output, weight_by_output
from vitq.graph import Graph
from vitq.quantizers import Quantizer
from vitq.ranges import Batches, add


def calibrate_adalog(
    graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images, 32 in the paper; held in memory.
        symmetric: weights without zero points, at every width.
        progress: is told how far it is, layer by layer.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    folded, activations = fold_channelwise(graph, plan, batches, fit_adaptive, progress=progress)

    def weigh(weight: Tensor, x: Tensor, bits: int) -> QuantizedWeight:
        rows = x.reshape(-1, x.shape[-1])
        return weight_by_output(weight, rows.T @ rows / len(rows), bits, symmetric)

    return assemble(folded, plan, fit_in_sequence(folded, plan, activations, batches, weigh, symmetric, progress), activations)


def fit_adaptive(x: Tensor, bits: int, operand: Operand, error: Callable[[Quantizer], float]) -> Quantizer:
    """AdaLog for a softmax or a GELU, uniform else: from the tensor's histogram, refined by the output's error."""
    kind = "adalog" if operand.role in ("post_softmax", "post_gelu") else "uniform"
    return refined_by_output(FITS[kind](add(None, x), bits), error)
