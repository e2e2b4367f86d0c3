"""The gamma family (Montavon et al. 2019): the epsilon rule with the terms of a place's own sign made larger, here by 1 + gamma.

With z_jk = x_j w_jk and y_k = sum_j z_jk + b_k,

    R_j = sum_k (z_jk + gamma z_jk^s) R_k / (y_k + gamma sum_j z_jk^s),        z^s = z+ where y_k >= 0, z- where y_k < 0,

which is the rule for inputs of both signs. gamma = 0 is the epsilon rule, gamma large the alpha = 1 rule where y is positive. The bias
absorbs its share, which gamma makes smaller. Pools and means give to the terms of the result's own sign (gamma large); all else is the
epsilon family.
"""

from collections.abc import Sequence

from torch import Tensor

from vitq.importance.relevance.chefer import same_sign_pool
from vitq.importance.relevance.epsilon import EPSILON_RULES
from vitq.importance.relevance.shared import POOLS, PRODUCTS, epsilon_product
from vitq.importance.relevance.step import Rules, Step, linear_in_input, ratio

GAMMA = 0.25


def gamma_product(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """A linear, convolution or matmul with a constant by the gamma rule; a matmul of two inputs in halves."""
    if len(step.inputs) > 1:
        return epsilon_product(step, relevance)
    linear, y = linear_in_input(step), step.output
    up, down = linear.x.clamp(min=0), linear.x.clamp(max=0)
    plus, minus = linear.weight.clamp(min=0), linear.weight.clamp(max=0)
    rises = y >= 0
    s_up = ratio(relevance * rises, y + GAMMA * (linear.apply(up, plus) + linear.apply(down, minus)))
    s_down = ratio(relevance * ~rises, y + GAMMA * (linear.apply(up, minus) + linear.apply(down, plus)))
    own_sign = up * (linear.back(s_up, plus) + linear.back(s_down, minus)) + down * (linear.back(s_up, minus) + linear.back(s_down, plus))
    return [linear.x * linear.back(s_up + s_down, linear.weight) + GAMMA * own_sign]


GAMMA_RULES: Rules = {**EPSILON_RULES, **dict.fromkeys(PRODUCTS, gamma_product), **dict.fromkeys(POOLS, same_sign_pool)}
