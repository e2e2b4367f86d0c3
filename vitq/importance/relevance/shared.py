"""The rules that all families share: ops that move values, ops that let relevance through, and factors.

* An op that only moves values (reshape, permute, slice, cat, roll, pad, index, ...) or chooses among them (masked_fill, maximum, max
  pooling) moves their relevance back by its own vector-Jacobian product: a copied value gets the sum over its copies, zeros that were put
  in keep what arrives at them.
* Norms, softmax and pointwise functions let relevance through unchanged: of an output, all of it belongs to the input at the same place.
* A factor that carries no relevance (LayerScale, a number) leaves all of it to the other; two that do share it in halves, which is
  gradient times input for each, halved. A divisor is a factor without relevance.
* Values that serve to normalise (rsqrt, the norm of a vector) are taken as constants.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitq.graph.dataflow import ACTIVATIONS, BIJECTIVE, CONVOLUTIONS, MATMULS, NORMS, PARTIAL, SOFTMAXES, aten
from vitq.importance.relevance.step import EPSILON, Rules, Step, ratio, times

MOVING = (BIJECTIVE | PARTIAL) | {
    aten.cat.default, aten.stack.default, aten.concat.default, aten.hstack.default, aten.vstack.default, aten.index.Tensor,
    aten.gather.default, aten.take_along_dim.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.slice_scatter.default, aten.select_scatter.default, aten.index_put.default,
    aten.repeat_interleave.self_int, aten.repeat_interleave.self_Tensor, aten.reflection_pad1d.default, aten.reflection_pad2d.default,
    aten.replication_pad2d.default, aten.unfold_copy.default, aten.as_strided.default, aten.diagonal.default,
    aten.tril.default, aten.triu.default, aten.channel_shuffle.default, aten.type_as.default, aten.to.dtype, aten.to.device,
    aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.meshgrid.indexing, aten.broadcast_tensors.default,
    aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default, aten.squeeze.dims, aten.movedim.int, aten.moveaxis.int,
    aten.max_pool1d.default, aten.max_pool2d.default, aten.amax.default, aten.amin.default, aten.maximum.default, aten.minimum.default,
    aten.sort.default, aten.topk.default, aten.max.dim, aten.min.dim, aten.adaptive_max_pool2d.default,
}  # fmt: skip

PASSING = NORMS | SOFTMAXES | ACTIVATIONS | {
    aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default, aten.tanh.default, aten.hardsigmoid.default,
    aten.softplus.default, aten.prelu.default, aten.selu.default, aten.celu.default, aten.log_sigmoid.default, aten.erf.default,
    aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default, aten.hardshrink.default, aten.softshrink.default,
    aten.pow.Tensor_Scalar, aten.square.default, aten.sqrt.default, aten.abs.default, aten.exp.default, aten.log.default,
    aten.log1p.default, aten.expm1.default, aten.sin.default, aten.cos.default,
}  # fmt: skip

PRODUCTS = CONVOLUTIONS | MATMULS | {
    aten.linear.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
}  # fmt: skip

SUMS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar}

POOLS = {
    aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default, aten.avg_pool1d.default, aten.avg_pool2d.default,
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.upsample_bilinear2d.vec, aten.upsample_bilinear2d.default,
    aten.col2im.default,
}  # fmt: skip
"""Weighted sums of their input whose weights are positive numbers."""

WITHOUT_RELEVANCE = {
    aten.rsqrt.default, aten.reciprocal.default, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar,
    aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default,
}  # fmt: skip
"""Ops whose results count as constants, though they read values of the image: normalisers, and what takes a shape only."""


def moved(step: Step, relevance: Tensor | tuple[Tensor, ...]) -> Sequence[Tensor]:
    """Relevance goes where the values came from."""
    return step.vjp(relevance)


def passed(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """R_in = R_out for the first input, nothing for others (a norm's gain that is computed)."""
    return [relevance, *(torch.zeros_like(x) for x in step.inputs[1:])]


def as_factors(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """A product y = a b, place by place: half of the relevance for each factor; all of it for one whose other factor carries none."""
    return [(relevance / len(step.inputs)).sum_to_size(x.shape) for x in step.inputs]


def divided(step: Step, relevance: Tensor) -> Sequence[Tensor]:
    """A quotient y = a / b: all relevance is the numerator's."""
    return [
        relevance.sum_to_size(x.shape) if place == 0 else torch.zeros_like(x)
        for x, place in zip(step.inputs, step.places, strict=True)
    ]  # fmt: skip


def epsilon_rule(step: Step, relevance: Tensor | tuple[Tensor, ...], epsilon: float = EPSILON) -> Sequence[Tensor]:
    """R_in = x vjp(R / (y + epsilon sign y)), the epsilon rule (Bach et al. 2015, eq. 58) for any op that can be differentiated.

    Exact for what is linear in its inputs, where biases and constant terms absorb their share; of another op it explains the
    first-order part. A product of two inputs would count twice: see `epsilon_product`.
    """
    if isinstance(relevance, Tensor):
        s = ratio(relevance, step.output, epsilon)
    else:
        s = tuple(ratio(part, y, epsilon) for part, y in zip(relevance, step.output, strict=True))
    return [times(x, gradient) for x, gradient in zip(step.inputs, step.vjp(s), strict=True)]


def epsilon_product(step: Step, relevance: Tensor, epsilon: float = EPSILON) -> Sequence[Tensor]:
    """A linear, convolution or matmul under the epsilon rule; the bias absorbs its share.

    Where both factors of Y = A B are inputs, each gets half: R_A = 1/2 A (S B^T), R_B = 1/2 B (A^T S), S = R / (Y + epsilon sign Y).
    """
    shares = epsilon_rule(step, relevance, epsilon)
    factors = sum(place < 2 for place in step.places)
    return [share / factors if place < 2 else share for share, place in zip(shares, step.places, strict=True)]


SHARED: Rules = {
    **dict.fromkeys(MOVING, moved),
    **dict.fromkeys(PASSING, passed),
    aten.neg.default: passed,
    aten.mul.Tensor: as_factors,
    aten.mul.Scalar: as_factors,
    aten.div.Tensor: divided,
    aten.div.Scalar: divided,
    aten.einsum.default: epsilon_product,
    aten.upsample_bicubic2d.vec: epsilon_rule,
}
"""The rules of every family; a family adds its own for products, sums, pools and what else it treats in its own way."""
