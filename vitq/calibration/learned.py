"""Fake quantization that gradients pass: scales learn, rounding is passed straight through, LSQ (Esser et al., ICLR 2020).

With steps u = x / scale, c = clip(round(u), range) the whole number that u becomes, and x^ = scale c,

    d x^ / d x     = 1 where u is inside the range, else 0
    d x^ / d scale = c - u inside the range, c outside                                  equation 3
    d x^ / d zero_point = 0 inside the range, -scale outside

The forward values are those of `affine.quantize_dequantize` bit by bit: what is trained is what is exported.
On the twin grid they are those of equal steps, c the grid's number less the zero point; knee, ratio and zero point stay.

A weight is learned in steps: W^ = scale clip(round(v), range), v of the weight's shape. Its scale is then a gain a channel, and a change
of the scale rounds no weight anew.
Differs from the paper: zero points learn too (LSQ+, Bhalgat et al., 2020); Adam makes the paper's factor on the scale's gradient idle;
rounding is not AdaRound's (rounding.py), which keeps a weight within one step: here it may move farther, to make up for the error of
the activations, which is the larger one. The two were not compared.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from vitq.affine import highest_code
from vitq.quantizers import Quantizer, TwinGrid


def learned_activation(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """x^ of x's shape; scale and zero point are float32 of no dimension, the zero point is rounded."""
    return _Activation.apply(x, scale, zero_point, bits)  # type: ignore[return-value]


def learned_weight(steps: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """W^ of v, (O, ...); scale, lowest and highest integer are (O, 1, ...)."""
    return _Weight.apply(steps, scale, lowest, highest)  # type: ignore[return-value]


def learned_twin_grid(x: Tensor, scale: Tensor, quantizer: TwinGrid) -> Tensor:
    """x^ of x's shape by the quantizer with another scale, which is float32 of no dimension."""
    return _TwinGrid.apply(x, scale, quantizer)  # type: ignore[return-value]


def bounded(x: Tensor, lowest: float, highest: float) -> Tensor:
    """Clips x, with the gradient of the identity: what starts at a bound can leave it, where torch's own clip passes nothing."""
    return x + (x.clamp(lowest, highest) - x).detach()


def straight_through(x: Tensor, quantizer: Quantizer) -> Tensor:
    """x^ by any quantizer, whose gradient is that of the identity."""
    return x + (quantizer.quantize_dequantize(x) - x).detach()


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        steps, zero = x / scale, zero_point.round()
        codes = steps.round().clamp_(-zero, highest_code(bits) - zero)
        ctx.save_for_backward(steps, codes, scale)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, codes, scale = ctx.saved_tensors
        (gradient,) = gradients
        inside = gradient * (steps.round() == codes)
        by_scale = (gradient * codes).sum() - (inside * steps).sum()
        return inside, by_scale, (inside.sum() - gradient.sum()) * scale, None


class _TwinGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, quantizer: TwinGrid) -> Tensor:
        steps = x / scale
        whole = quantizer.integers(quantizer.codes(steps)) - quantizer.zero_point
        ends = quantizer.integers(torch.tensor([0.0, highest_code(quantizer.bits)])) - quantizer.zero_point
        ctx.save_for_backward(steps, whole, (steps >= ends[0] - 0.5) & (steps <= ends[1] + quantizer.ratio / 2))
        return whole * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        steps, whole, inside = ctx.saved_tensors
        (gradient,) = gradients
        within = gradient * inside
        return within, (gradient * whole).sum() - (within * steps).sum(), None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, steps: Tensor, scale: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
        whole = steps.round()
        codes = torch.minimum(torch.maximum(whole, lowest), highest)
        ctx.save_for_backward(codes, scale, whole == codes)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, inside = ctx.saved_tensors
        (gradient,) = gradients
        by_scale = (gradient * codes).sum(tuple(range(1, codes.dim())), keepdim=True)
        return gradient * scale * inside, by_scale, None, None
