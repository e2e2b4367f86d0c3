"""AttnLRP (Achtibat et al., ICML 2024): the epsilon family, and the Taylor expansion of the softmax.

* softmax s = softmax(x): R_i = x_i (R_i' - s_i sum_j R_j'), its first-order expansion at x; what the expansion leaves as a constant
  is absorbed, so relevance is not conserved here (Proposition 3.1);
* matmul Y = A B: A_ji B_ip R_jp / (2 Y_jp + epsilon) for each operand (Proposition 3.3);
* norms and pointwise nonlinearities: identity; products place by place: half for each factor (Propositions 3.2 and 3.4);
* linears, sums, pools: epsilon, the bias absorbs its share.

Differs from the paper: it tunes gamma rules for the linears of vision transformers; choose `gamma` for these.
"""

from collections.abc import Sequence

from torch import Tensor

from vitq.graph.dataflow import SOFTMAXES
from vitq.importance.relevance.epsilon import EPSILON_RULES
from vitq.importance.relevance.step import Rules, Step, times


def softmax_expanded(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """R_i = x_i (R_i' - s_i sum_j R_j')."""
    axis = step.arguments[1]
    return [times(step.inputs[0], relevance - step.output * relevance.sum(axis, keepdim=True))]


ATTNLRP_RULES: Rules = {**EPSILON_RULES, **dict.fromkeys(SOFTMAXES, softmax_expanded)}
