"""Weights that make up for quantized inputs: the first half of ERQ (Zhong et al., ICML 2024, activation quantization error reduction).

A layer that reads x^ in place of x shall give W x again. Ridge regression of that output on x^, drawn towards the weights W,

    W' = argmin  E |W x - W' x^|^2 + lambda |W' - W|^2  =  W + W (C - S)^T (S + lambda I)^-1

with S the covariance of x^ and C that of x^ with x (inputs.py). The weights stay float here; their rounding follows.
Differs from the paper: the inputs are centred, which is the paper's column of ones without a ridge on the bias; lambda is in units of the
inputs' mean square, not absolute.
"""

import torch
from torch import Tensor

from vitq.fitting.inputs import ridged


def absorbed(weight: Tensor, second_moment: Tensor, missing: Tensor, ridge: float = 0.01) -> Tensor:
    """The weight W' of the module's equation, float32 (O, I).

    Args:
        weight: (O, I) float32.
        second_moment: S, (I, I) (`InputPairs.covariance`).
        missing: C - S, (I, I), rows of the quantized network's inputs (`InputPairs.missing`).
        ridge: lambda, in units of the inputs' mean square.
    """
    change = torch.linalg.solve(ridged(second_moment, ridge), missing.double() @ weight.T.double())
    return (weight.double() + change.T).float()
