"""Rounds a linear's weights column by column; those still to come make up for each rounding error: GPTQ (Frantar et al., ICLR 2023).

What is to be small is the error of the output, |(W - W^) X|^2 = sum over rows of e S e^T, with S the second moment of the inputs that
the quantized network gives the layer. With H = S + lambda I, and H^-1 = U^T U for an upper triangular U (Cholesky), for column i

    e_i = (w_i - Q(w_i)) / U_ii        w_j <- w_j - e_i U_ij        for all j > i

which is, column by column, the best that float weights to the right can do (Optimal Brain Surgeon). A large lambda trusts S less, down
to rounding to nearest. Columns are taken in blocks: those to the right of a block are updated once for all of it.
Differs from the paper: columns go in the order of falling input power, as in the authors' later code; lambda is a ridge of any size,
as in ERQ (Zhong et al., ICML 2024); the scales are given and fixed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, weight_codes
from vitq.fitting.inputs import ridged

_BLOCK = 32  # columns


def compensated(weight: Tensor, second_moment: Tensor, scale: Tensor, zero_point: Tensor, bits: int, ridge: float = 0.1) -> QuantizedWeight:
    """The codes of a linear's weight whose output errors are made up for within each row.

    Args:
        weight: (O, I) float32.
        second_moment: of the inputs that the layer reads, (I, I) (`InputPairs.float_covariance`, `input_covariances`).
        scale: (O,) float32.
        zero_point: (O,).
        bits: 2 to 8.
        ridge: lambda, in units of the inputs' mean square.
    """
    return compensated_widths(weight, second_moment, [(scale, zero_point)], [bits], ridge)[0]


def compensated_widths(
    weight: Tensor, second_moment: Tensor, qparams: Sequence[tuple[Tensor, Tensor]], bits: Sequence[int], ridge: float = 0.1
) -> list[QuantizedWeight]:
    """The same at many widths at once, `qparams` being scale and zero point at each of `bits`: they share the matrix and its factor."""
    order = second_moment.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(second_moment[order][:, order], ridge)
    columns = weight.T.double()[order].repeat(1, len(bits))  # (I, widths O): a column of the weight is a row here
    scale, zero_point = (torch.cat(parts).double() for parts in zip(*qparams, strict=True))
    lowest, highest = torch.tensor([weight_codes(width) for width in bits], device=weight.device).repeat_interleave(len(weight), 0).T
    codes = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, len(columns), _BLOCK):
        last = min(first + _BLOCK, len(columns))
        errors = columns.new_zeros(last - first, columns.shape[1])
        for i in range(first, last):
            code = (columns[i] / scale).round_().add_(zero_point).clamp_(lowest, highest)
            codes[i] = code
            errors[i - first] = (columns[i] - (code - zero_point) * scale) / factor[i, i]
            columns[i + 1 : last] -= torch.outer(factor[i, i + 1 : last], errors[i - first])
        columns[last:] -= factor[first:last, last:].T @ errors
    found = codes[order.argsort()].T.contiguous().split(len(weight))
    rounded = zip(found, qparams, bits, strict=True)
    return [QuantizedWeight(some, scale, zero_point.to(torch.uint8), width) for some, (scale, zero_point), width in rounded]


def _inverse_factor(second_moment: Tensor, ridge: float) -> Tensor:
    """The upper triangular U with U^T U the inverse of S + lambda I; lambda grows until rounding in S leaves that positive definite."""
    while True:
        root, failed = torch.linalg.cholesky_ex(ridged(second_moment, ridge))
        if not int(failed):
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root), upper=True)
            if not int(failed):
                return factor
        ridge *= 10
