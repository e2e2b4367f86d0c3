"""Recipe `repq-vit`: RepQ-ViT (Li et al., ICCV 2023), on 32 images and without learning.

LayerNorm outputs are quantized channel by channel and folded to one scale (channelwise.py); softmax outputs by powers of sqrt 2; all else
uniformly, weights for each output channel. Every range lies between two quantiles, of three pairs the one with the least squared error,
fitted from the front to the back in one pass; the folded weights are fitted again. Nothing corrects biases, or weights each other.

Differs from the paper: the softmax's quantizer has 2^bits values, where the paper's code has one more (0); weights of 7 and 8 bits have
no zero point and no integer beyond 64 (vitq/affine.py); see also channelwise.py.
"""

from vitq.artifacts import BitPlan
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress
from vitq.calibration.channelwise import fold_channelwise, folded_weights
from vitq.checkpoint import Checkpoint
from vitq.graph import Graph
from vitq.ranges import Batches


def calibrate_repq_vit(
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
    folded, activations = fold_channelwise(graph, plan, batches, progress=progress)
    return assemble(folded, plan, folded_weights(folded, plan, symmetric), activations)
