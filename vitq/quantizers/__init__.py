"""Quantizers of activations: one file each, one line of `QUANTIZERS` each.

A quantizer is a frozen value: the parameters of a map from numbers to codes 0..2^bits - 1 and back. All share one form,

    codes = clip(round(compand(x)), 0, 2^bits - 1)        x^ = expand(codes)

so that b bits never stand for more than 2^b values, which several papers' own code does not keep to. Parameters are plain numbers and
go to JSON and back. Fitting them to what a tensor holds is in `vitq.fitting`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from torch import Tensor

from vitq.quantizers.adalog import AdaLog
from vitq.quantizers.log2 import Log2
from vitq.quantizers.log_sqrt2 import LogSqrt2
from vitq.quantizers.power_of_two_factor import PowerOfTwoFactor
from vitq.quantizers.row_squares import RowSquares
from vitq.quantizers.twin_grid import TwinGrid
from vitq.quantizers.twin_uniform import TwinUniform
from vitq.quantizers.uniform import Uniform

__all__ = [
    "INTEGER_QUANTIZERS", "QUANTIZERS", "AdaLog", "IntegerQuantizer", "Log2", "LogSqrt2", "PowerOfTwoFactor", "Quantizer",
    "RowSquares", "TwinGrid", "TwinUniform", "Uniform", "from_json", "to_json",
]  # fmt: skip


class Quantizer(Protocol):
    """What every entry of `QUANTIZERS` offers; tests/test_quantizers.py holds each to the promises below.

    A higher value never gets a lower x^, x^ itself is kept, and a value of any size, 0 and infinities included, has a code. Of
    row-squares all that holds within a row, the last axis.
    """

    @property
    def bits(self) -> int:
        """The width, 2 to 8."""
        ...

    def quantize(self, x: Tensor) -> Tensor:
        """The codes of float32 values, whole float32 numbers in [0, 2^bits - 1], of x's shape."""
        ...

    def dequantize(self, codes: Tensor) -> Tensor:
        """The values that codes stand for, float32, of the codes' shape."""
        ...

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """`x` moved to a value that has a code, of x's shape."""
        ...


class IntegerQuantizer(Quantizer, Protocol):
    """A quantizer that integer kernels can read: x^ = scale (integers - zero_point), the integers being uint8.

    Of row-squares that is what is then divided by its sum over each row.
    """

    @property
    def scale(self) -> float:
        """What one step of the integers is worth."""
        ...

    @property
    def zero_point(self) -> int:
        """The integer that stands for 0, in 0..255."""
        ...

    def integers(self, codes: Tensor) -> Tensor:
        """The integers of codes, whole float32 numbers in 0..255, of the codes' shape."""
        ...


QUANTIZERS: dict[str, type[Any]] = {
    "uniform": Uniform,
    "log2": Log2,
    "log-sqrt2": LogSqrt2,
    "adalog": AdaLog,
    "twin-uniform": TwinUniform,
    "twin-grid": TwinGrid,
    "power-of-two-factor": PowerOfTwoFactor,
    "row-squares": RowSquares,
}


INTEGER_QUANTIZERS = (Uniform, RowSquares, TwinGrid)
"""The kinds that are an `IntegerQuantizer`: what export writes."""


def to_json(quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer as plain values: its name in `QUANTIZERS` under "quantizer", and its parameters."""
    name = next(name for name, kind in QUANTIZERS.items() if type(quantizer) is kind)
    return {"quantizer": name} | {key: list(part) if isinstance(part, tuple) else part for key, part in asdict(quantizer).items()}  # type: ignore[call-overload]


def from_json(entry: Mapping[str, Any]) -> Quantizer:
    """The quantizer that `to_json` wrote down.

    Raises:
        ValueError: the name is not known, or the parameters are not those of such a quantizer.
    """
    parameters = {key: tuple(part) if isinstance(part, list) else part for key, part in entry.items()}
    name = parameters.pop("quantizer", None)
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer {name!r} is not known; there are {', '.join(QUANTIZERS)}")
    try:
        return QUANTIZERS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"{parameters} are not the parameters of quantizer {name!r}: {error}") from None
