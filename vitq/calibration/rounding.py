"""Rounding as something to be learned: AdaRound (Nagel et al., ICML 2020), with a variable v for every weight.

    h(v) = clip(1.2 sigmoid(v) - 0.1, 0, 1)                                            equation 23
    W^ = scale (clip(floor(W / scale) + h(v) + zero_point, codes) - zero_point)        equation 22
    penalty = sum 1 - |2 h(v) - 1|^beta                                                equation 24

At first h(v) is the fraction that floor drops, and W^ the float weight. beta falls from 20 to 2 and with it the penalty draws every h to
0 or 1; at the end h >= 1/2 rounds up. All are pure functions for a recipe that minimises the output's error plus the penalty.
Differs from the paper: codes are those of `affine.weight_codes`; beta falls linearly after the warm-up, as in the code of BRECQ.
"""

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, weight_codes

_FIRST_BETA, _LAST_BETA = 20.0, 2.0
_WARM_UP = 0.2  # of all steps, without a penalty


def fraction(variables: Tensor) -> Tensor:
    """h(v), in [0, 1]."""
    return (1.2 * variables.sigmoid() - 0.1).clamp(0, 1)


def first_variables(weight: Tensor, scale: Tensor) -> Tensor:
    """The variables whose h is what floor(W / scale) drops: of the weight's shape (O, ...), scale (O,)."""
    steps = weight / _per_channel(scale, weight)
    return (((steps - steps.floor()) + 0.1) / 1.2).logit()


def penalty(variables: Tensor, beta: float) -> Tensor:
    """How far the fractions are from 0 and 1: 0 where all have arrived, at most one a weight."""
    return (1 - (2 * fraction(variables) - 1).abs().pow(beta)).sum()


def beta_at(progress: float) -> float | None:
    """The exponent after a part of all steps, in [0, 1]; None while there is no penalty."""
    if progress < _WARM_UP:
        return None
    return _FIRST_BETA + (_LAST_BETA - _FIRST_BETA) * (progress - _WARM_UP) / (1 - _WARM_UP)


def softly_rounded(weight: Tensor, variables: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """W^ with fractions, differentiable by variables and scale: of the weight's shape (O, ...); scale and zero point (O,)."""
    scales, zero_points = _per_channel(scale, weight), _per_channel(zero_point, weight)
    codes = (weight / scales).detach().floor() + fraction(variables) + zero_points
    return (codes.clamp(*weight_codes(bits)) - zero_points) * scales


def rounded(weight: Tensor, variables: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> QuantizedWeight:
    """The codes that the variables choose, up where h >= 1/2."""
    up = (fraction(variables) >= 0.5).to(weight)
    codes = (weight / _per_channel(scale, weight)).floor() + up + _per_channel(zero_point, weight)
    return QuantizedWeight(codes.clamp(*weight_codes(bits)).to(torch.uint8), scale.detach(), zero_point.to(torch.uint8), bits)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))
