"""The mean and the spread of a layer's output channels, and what gives a quantized layer those that the float network has.

Per output channel o of y = W x + b, with y^ what the quantized layer makes of its quantized inputs without the bias,

    gain_o = sd(y_o) / sd(y^_o)          bias_o = E[y_o] - gain_o E[y^_o]

The mean alone is the usual bias correction (Nagel et al., ICCV 2019, section 4.2).
"""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.artifacts import Layer

_LARGEST_GAIN = 2.0  # what shrinks more has lost its signal; noise should not be blown up in its place


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of a layer's output, per channel: float64 (O,)."""

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, layer: Layer, output: Tensor) -> "Moments":
        """The moments of one output, (..., O) of a linear and (B, O, ...) of a convolution."""
        rows = output.movedim(-1 if layer.op == "linear" else 1, -1).reshape(-1, layer.channels).double()
        return cls(len(rows), rows.sum(0), rows.square().sum(0))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both outputs together."""
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def mean(self) -> Tensor:
        """The mean of each channel."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """The variance of each channel."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0)


def gather(moments: MutableMapping[str, Moments], layer: Layer, output: Tensor) -> Moments:
    """Adds an output to those of its layer, and returns them."""
    new = Moments.of(layer, output)
    moments[layer.name] = moments[layer.name] + new if layer.name in moments else new
    return moments[layer.name]


def correction(wanted: Moments, found: Moments) -> tuple[Tensor, Tensor]:
    """Gain and bias of the module's equations, float64 (O,); a channel that does not vary keeps its gain."""
    varies = (found.variance > 1e-12 * found.squares / found.count) & (wanted.variance > 0)
    gain = torch.where(varies, (wanted.variance / found.variance.clamp(min=1e-300)).sqrt(), 1.0).clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN)
    return gain, wanted.mean - gain * found.mean


def corrected(layer: Layer, output: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """The output times the gain plus the bias, each channel its own."""
    per_channel = (-1, *[1] * (0 if layer.op == "linear" else output.dim() - 2))
    return output * gain.to(output).reshape(per_channel) + bias.to(output).reshape(per_channel)
