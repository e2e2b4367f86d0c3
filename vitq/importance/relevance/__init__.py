"""Layer-wise relevance propagation over a captured graph: which values made the network say what it says.

The output's relevance is handed back op by op until it reaches the image; each op shares what arrives at its output among its inputs,
by a *rule*. A family of rules is a table from ATen op to rule, one file each; ops that it does not name take the epsilon rule through
their vector-Jacobian product. Up to what biases, constants and zeros absorb, the relevance of every cut of the graph has one sum.
"""

from vitq.importance.relevance.attnlrp import ATTNLRP_RULES
from vitq.importance.relevance.chefer import CHEFER_RULES
from vitq.importance.relevance.epsilon import EPSILON_RULES
from vitq.importance.relevance.gamma import GAMMA_RULES
from vitq.importance.relevance.propagation import Propagated, propagate
from vitq.importance.relevance.step import Rules

__all__ = ["RULES", "Propagated", "Rules", "propagate"]

RULES: dict[str, Rules] = {
    "chefer": CHEFER_RULES,
    "epsilon": EPSILON_RULES,
    "gamma": GAMMA_RULES,
    "attnlrp": ATTNLRP_RULES,
}
