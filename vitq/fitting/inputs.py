"""Second moments of what a linear reads, from the float network (x) and from the quantized one (x^), streamed over the images.

    S = E[x^ x^^T] - m^ m^^T        C = E[x^ x^T] - m^ m^T

They are centred, m and m^ the means: calibration gives every output channel its mean through the bias, and so an error of the weights
costs what it makes of the inputs' spread alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InputMoments:
    """Sums over tokens of both networks' inputs and of their products: float64 (I,), (I,), (I, I), (I, I)."""

    count: int
    total: Tensor
    quantized_total: Tensor
    quantized_squares: Tensor
    products: Tensor

    @classmethod
    def of(cls, x: Tensor, quantized: Tensor) -> "InputMoments":
        """The moments of inputs (..., I) in the float and in the quantized network."""
        rows, read = (value.reshape(-1, value.shape[-1]).double() for value in (x, quantized))
        return cls(len(rows), rows.sum(0), read.sum(0), read.T @ read, read.T @ rows)

    def __add__(self, other: "InputMoments") -> "InputMoments":
        """The moments of both batches together."""
        return InputMoments(
            self.count + other.count,
            self.total + other.total,
            self.quantized_total + other.quantized_total,
            self.quantized_squares + other.quantized_squares,
            self.products + other.products,
        )

    @property
    def quantized_covariance(self) -> Tensor:
        """S of the module's equations."""
        mean = self.quantized_total / self.count
        return self.quantized_squares / self.count - torch.outer(mean, mean)

    @property
    def covariance(self) -> Tensor:
        """C of the module's equations, rows of the quantized network's inputs."""
        return self.products / self.count - torch.outer(self.quantized_total, self.total) / self.count**2


def ridged(second_moment: Tensor, ridge: float) -> Tensor:
    """S + ridge mean(diag S) I in float64: a `ridge` of 0.01 adds a hundredth of the inputs' mean square. S = 0 counts as I."""
    matrix = second_moment.double()
    mean = matrix.diagonal().mean()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix + ridge * mean * identity if float(mean) > 0 else identity
