"""Second moments of what a linear reads, from the float network (x) and from the quantized one (x^), streamed over the images.

    S = E[x^ x^^T] - m^ m^^T        C = E[x^ x^T] - m^ m^T

They are centred, m and m^ the means: calibration gives every output channel its mean through the bias, and so an error of the weights
costs what it makes of the inputs' spread alone.
"""

from math import gcd

import torch
from torch import Tensor

from vitq.moments import Moments

_ROWS = 2048  # tokens of a batch that sums are taken from


class InputPairs:
    """Sums of rows about their batch's mean, which a large mean leaves their digits."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor, read: Tensor) -> None:
        """Takes in one batch of inputs (tokens, I) in the float and in the quantized network; sums are of their dtype."""
        count, mean, quantized_mean = len(rows), rows.mean(0), read.mean(0)
        rows, read = rows - mean, read - quantized_mean
        floats = rows.T @ rows
        squares, missing = read.T @ read, read.T @ (rows - read)
        if not self.count:
            self._floats = floats
            self.count, self.mean, self.quantized_mean, self._squares, self._missing = count, mean, quantized_mean, squares, missing
            return
        shift, quantized_shift = mean - self.mean, quantized_mean - self.quantized_mean
        both = count * self.count / (count + self.count)
        self._squares += squares.addr_(quantized_shift, quantized_shift, alpha=both)
        self._floats += floats.addr_(shift, shift, alpha=both)
        self._missing += missing.addr_(quantized_shift, shift - quantized_shift, alpha=both)
        self.count += count
        self.mean = self.mean + shift * (count / self.count)
        self.quantized_mean = self.quantized_mean + quantized_shift * (count / self.count)

    @property
    def covariance(self) -> Tensor:
        """S of the module's equations."""
        return self._squares / self.count

    @property
    def float_covariance(self) -> Tensor:
        """The covariance of x."""
        return self._floats / self.count

    @property
    def missing(self) -> Tensor:
        """C - S of the module's equations: what x^ lacks of x."""
        return self._missing / self.count

    def output(self, weight: Tensor) -> Moments:
        """What a weight (O, I) makes of x^: its output's mean and spread in each channel."""
        weight = weight.double()
        mean = weight @ self.quantized_mean.double()
        variance = torch.linalg.vecdot(weight @ self.covariance.double(), weight)
        return Moments(self.count, self.count * mean, self.count * (variance + mean.square()))


def some_rows(x: Tensor) -> Tensor:
    """At most some 2,048 tokens of a batch (..., I), evenly spread: float32 (tokens, I)."""
    rows = x.reshape(-1, x.shape[-1])
    step = max(len(rows) // _ROWS, 1)
    while step > 1 and gcd(step, len(rows)) > 1:  # no common factor: it does not fall in step with the tokens
        step += 1
    return rows[::step].float()


def ridged(second_moment: Tensor, ridge: float) -> Tensor:
    """S + ridge mean(diag S) I in float64: a `ridge` of 0.01 adds a hundredth of the inputs' mean square. S = 0 counts as I."""
    matrix = second_moment.double()
    mean = matrix.diagonal().mean()
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    return matrix + ridge * mean * identity if float(mean) > 0 else identity
