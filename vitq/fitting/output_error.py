"""Searches by what quantizing does to the layer's output: AdaLog's objective (Wu et al., ECCV 2024), and PTQ4ViT's but for its weights.

An activation's quantizer is refined from one that fits the tensor: of the eight neighbours of its two parameters the best is taken, and the
spacing halved, six times, from half an octave on. A weight's row with error e costs e S e^T, S the second moment of what the layer reads,
which is the squared error of that output; of 48 ranges, both ends shrunk together, each row gets the best.
Differs from the papers: one point is kept from stage to stage, where AdaLog keeps several, and activations and weights are searched once,
where the papers take three rounds.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, highest_code, quantize_weight, weight_codes, weight_qparams
from vitq.fitting.search import as_scale
from vitq.fitting.uniform import spanning
from vitq.quantizers import AdaLog, Quantizer, TwinUniform, Uniform
from vitq.quantizers.adalog import LARGEST_NUMERATOR

_STAGES = 6
_SPACING = 0.5  # octaves, at first
_SHRINKS = 48
_SMALLEST = 0.3  # of a row's range


def refined_by_output(first: Quantizer, error: Callable[[Quantizer], float]) -> Quantizer:
    """The quantizer near `first` that the least error is found for; Uniform, AdaLog and TwinUniform move, others stay."""
    errors = {first: error(first)}
    best = first
    for stage in range(_STAGES):
        spacing = _SPACING / 2**stage
        for moves in product((-spacing, 0.0, spacing), repeat=2):
            for candidate in _moved(best, *moves):
                if candidate not in errors:
                    errors[candidate] = error(candidate)
        best = min(errors, key=errors.__getitem__)
    return best


def weight_by_output(weight: Tensor, second_moment: Tensor, bits: int, symmetric: bool = False) -> QuantizedWeight:
    """A linear's weight (O, I) rounded to nearest, in ranges with the least error of the output.

    Args:
        weight: float32.
        second_moment: of what the layer reads, (I, I).
        bits: 2 to 8.
        symmetric: no zero points.
    """
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    best, found = torch.full_like(low, torch.inf), weight_qparams(low, high, bits, symmetric)
    for shrink in torch.linspace(1.0, _SMALLEST, _SHRINKS).tolist():
        scale, zero_point = weight_qparams(low * shrink, high * shrink, bits, symmetric)
        codes = (weight / scale[:, None]).round_().add_(zero_point[:, None]).clamp_(*weight_codes(bits))
        errors = codes.sub_(zero_point[:, None]).mul_(scale[:, None]).sub_(weight)
        cost = torch.linalg.vecdot(errors @ second_moment, errors)
        better = cost < best
        best = torch.where(better, cost, best)
        found = torch.where(better, scale, found[0]), torch.where(better, zero_point, found[1])
    return quantize_weight(weight, *found, bits)


def _moved(quantizer: Quantizer, first: float, second: float) -> list[Quantizer]:
    if isinstance(quantizer, Uniform):
        low, high = (
            (code - quantizer.zero_point) * quantizer.scale * 2**octaves
            for code, octaves in ((0, first), (highest_code(quantizer.bits), second))
        )
        return [spanning(low, high, quantizer.bits)]
    if isinstance(quantizer, AdaLog):
        numerator = min(max(round(quantizer.numerator * 2**second), 1), LARGEST_NUMERATOR)
        scale = as_scale(quantizer.scale * 2**first)
        return [replace(quantizer, scale=scale, numerator=numerator, holds_zero=zero) for zero in (False, True)]
    if isinstance(quantizer, TwinUniform):
        upper, lower = as_scale(quantizer.upper_step * 2**first), as_scale(quantizer.lower_step * 2**second)
        return [replace(quantizer, lower_step=lower if quantizer.negative else min(lower, upper), upper_step=upper)]
    return []
