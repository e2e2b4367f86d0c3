"""Chefer's rules (Chefer, Gur and Wolf, CVPR 2021, "Transformer Interpretability Beyond Attention Visualization"), with alpha = 1.

* linear and convolution, the bias ignored: only what pushes a place up gets its relevance,
  Z = W+ x+ + W- x-,   S = R / Z,   R_in = x+ (W+^T S) + x- (W-^T S);
* on pixels, which may be negative, by the bounds L <= x <= H of the image (the z^B rule):
  Z = W x - W+ L - W- H,   R_in = x (W^T S) - L (W+^T S) - H (W-^T S);
* matmul of two activations: gradient times input, half for each;
* sum y = a + b: a R / y and b R / y, then both rescaled so that together they hold what arrived:
  |sum R_a| : |sum R_b| stays as it was, which keeps cancelling terms from growing without bound;
* norms, softmax, activations: identity.

Differs from the paper: sums are rescaled image by image, not over the batch; a value that several ops read gets the sum of what they give
it, also where it is 0; pools and means give to the terms of the result's own sign, in proportion (gradient times input divides by a sum
whose terms cancel). A constant term of a sum (a position embedding, a mask) absorbs its share, a number nothing.
"""

from collections.abc import Sequence

from torch import Tensor

from vitq.importance.relevance.shared import POOLS, PRODUCTS, SHARED, SUMS, epsilon_product
from vitq.importance.relevance.step import (
    Linear,
    Rules,
    Step,
    linear_in_input,
    ratio,
    spread_per_image,
    sum_per_image,
    times,
    vjp,
)

_EPSILON = 1e-9
_SUBTRACTIONS = {op for op in SUMS if "sub" in str(op)}


def positive_product(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """A linear, convolution or matmul with a constant by alpha = 1 (or z^B on pixels); a matmul of two inputs in halves."""
    if len(step.inputs) > 1:
        return epsilon_product(step, relevance, _EPSILON)
    linear = linear_in_input(step)
    return [bounded(linear, relevance) if step.on_pixels else positive(linear, relevance)]


def positive(linear: Linear, relevance: Tensor) -> Tensor:
    """R_in = x+ (W+^T S) + x- (W-^T S)."""
    x, w = linear.x, linear.weight
    z = linear.apply(x.clamp(min=0), w.clamp(min=0)) + linear.apply(x.clamp(max=0), w.clamp(max=0))
    s = ratio(relevance, z, _EPSILON)
    return x.clamp(min=0) * linear.back(s, w.clamp(min=0)) + x.clamp(max=0) * linear.back(s, w.clamp(max=0))


def bounded(linear: Linear, relevance: Tensor) -> Tensor:
    """R_in = x (W^T S) - L (W+^T S) - H (W-^T S), L and H an image's least and greatest value."""
    x, w = linear.x, linear.weight
    others = tuple(range(1, x.dim()))
    low, high = x.amin(others, keepdim=True).expand_as(x), x.amax(others, keepdim=True).expand_as(x)
    z = linear.apply(x, w) - linear.apply(low, w.clamp(min=0)) - linear.apply(high, w.clamp(max=0))
    s = ratio(relevance, z, _EPSILON)
    return x * linear.back(s, w) - low * linear.back(s, w.clamp(min=0)) - high * linear.back(s, w.clamp(max=0))


def rescaled_sum(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """The two terms' shares, each rescaled so that they hold together what arrived."""
    scale = step.keywords.get("alpha", 1) * (-1 if step.op in _SUBTRACTIONS else 1)
    terms = step.arguments[0], step.arguments[1]
    if not all(isinstance(term, Tensor) for term in terms):
        return [relevance.sum_to_size(x.shape) for x in step.inputs]
    s = ratio(relevance, step.output, _EPSILON)
    shares = [times(terms[0].expand_as(s), s), times((scale * terms[1]).expand_as(s), s)]
    first, second, arrived = (sum_per_image(part, step.images, step.image_axis) for part in (*shares, relevance))
    whole = first.abs() + second.abs()
    factors = [ratio(arrived * total.sign(), whole, _EPSILON) for total in (first, second)]
    return [
        (shares[place] * spread_per_image(factors[place], relevance, step.image_axis)).sum_to_size(terms[place].shape)
        for place in step.places
    ]


def same_sign_pool(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """A sum with positive weights: relevance for the terms that have the result's sign, in proportion."""
    (x,) = step.inputs
    up, down = step.compute(x.clamp(min=0)), step.compute(x.clamp(max=0))
    rises = step.output >= 0
    s_up, s_down = ratio(relevance * rises, up, _EPSILON), ratio(relevance * ~rises, down, _EPSILON)
    (to_up,), (to_down,) = vjp(step.compute, [x], s_up), vjp(step.compute, [x], s_down)
    return [x.clamp(min=0) * to_up + x.clamp(max=0) * to_down]


CHEFER_RULES: Rules = {
    **SHARED,
    **dict.fromkeys(PRODUCTS, positive_product),
    **dict.fromkeys(SUMS, rescaled_sum),
    **dict.fromkeys(POOLS, same_sign_pool),
}
