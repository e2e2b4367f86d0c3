"""The epsilon family: R_j = sum_k x_j w_jk R_k / (z_k + epsilon sign z_k), z = W x + b (Bach et al. 2015).

Linears, convolutions, sums and pools in proportion to their terms, signs included; a bias or constant term absorbs b_k R_k / z_k. A
matmul of two activations gives half to each. Norms, softmax and activations let relevance through. Where terms cancel, shares are large
and of both signs, and grow from layer to layer: this is the gradient times the input of a network whose nonlinearities are held.
"""

from vitq.importance.relevance.shared import POOLS, PRODUCTS, SHARED, SUMS, epsilon_product, epsilon_rule
from vitq.importance.relevance.step import Rules

EPSILON_RULES: Rules = {**SHARED, **dict.fromkeys(PRODUCTS, epsilon_product), **dict.fromkeys(SUMS | POOLS, epsilon_rule)}
