"""Rounds a linear's weights half by half: the second half of ERQ (Zhong et al., ICML 2024, weight quantization error reduction).

Of the columns that are still float, the next half is rounded, to e_1 = W^_1 - W_1, and the others make up for it by ridge regression,

    W_2 <- W_2 - e_1 S_12 (S_22 + lambda I)^-1

until none is left. Within a half, rounding is refined row by row: of the weights whose error and whose gradient S_11 e_1 have one sign,
the one with the largest gradient goes to its other neighbour, as long as e_1 S_11 e_1^T falls.
Differs from the paper: lambda is in units of the inputs' mean square; inputs may be centred (inputs.py).
"""

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, weight_codes
from vitq.fitting.inputs import ridged

_FLIPS = 100  # a row and half, at most


def halved(weight: Tensor, second_moment: Tensor, scale: Tensor, zero_point: Tensor, bits: int, ridge: float = 0.01) -> QuantizedWeight:
    """The codes of a linear's weight; arguments as for `compensation.compensated`."""
    matrix, moment = ridged(second_moment, ridge), second_moment.double()
    rows, codes = weight.double(), torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    first, inputs = 0, weight.shape[1]
    while first < inputs:
        last = first + max((inputs - first) // 2, 1)
        half = rows[:, first:last]
        chosen = refined(half, moment[first:last, first:last], scale, zero_point, bits)
        codes[:, first:last] = chosen.to(torch.uint8)
        error = (chosen - zero_point[:, None]) * scale[:, None] - half
        change = torch.linalg.solve(matrix[last:, last:], moment[last:, first:last] @ error.T).T
        rows = torch.cat([rows[:, :last], rows[:, last:] - change], 1)
        first = last
    return QuantizedWeight(codes, scale, zero_point.to(torch.uint8), bits)


def refined(weight: Tensor, second_moment: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The codes (O, I), whole float64 numbers, that flipping roundings finds from the nearest ones; arguments in float64."""
    scales, zero_points = scale.double()[:, None], zero_point.double()[:, None]
    lowest, highest = weight_codes(bits)
    codes = ((weight / scales).round() + zero_points).clamp(lowest, highest)
    error = (codes - zero_points) * scales - weight
    gradient = error @ second_moment
    diagonal = second_moment.diagonal()
    for _ in range(min(_FLIPS, weight.shape[1])):
        step = -error.sign()  # a code that was rounded up goes down
        possible = (error * gradient > 0) & (error.abs() < scales) & (codes + step >= lowest) & (codes + step <= highest)
        best = torch.where(possible, gradient.abs(), -1.0).argmax(1, keepdim=True)
        change = step.gather(1, best) * scales
        gain = 2 * change * gradient.gather(1, best) + change.square() * diagonal[best[:, 0]][:, None]
        falls = possible.gather(1, best) & (gain < 0)
        if not bool(falls.any()):
            break
        change = torch.where(falls, change, 0.0)
        codes.scatter_add_(1, best, change / scales)
        error.scatter_add_(1, best, change)
        gradient += change * second_moment[best[:, 0]]
    return codes.round()
