"""What an allocation may spend: `--budget` texts read into sums of exact integers over the layers.

A budget gives each layer at its widths a whole amount (parameters x bits, MACs x bits, bytes, BitOps), and a limit on the sum over all
layers. Nothing is rounded: an average is multiplied out (sum of parameters x bits <= average x parameters, the right side rounded
down), a latency is in nanoseconds. A new kind of budget is one function here and one line of `BUDGETS`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

from vitq.allocation.choices import Scope, Widths, parse_widths
from vitq.allocation.sizes import stored_bytes
from vitq.artifacts import Layer
from vitq.errors import InputError, UsageError
from vitq.latency import LatencyTable

ACCEPTED = "give average bits (4.0, or 4.0/8.0 for weights/activations), size=3.2MB, bops=1.5G, like=4 or latency=4.0ms"

Amount = Callable[[Layer, int | None, int], int]
"""(layer, weight_bits or None for a matmul, activation_bits) -> a whole amount, at least 0."""


@dataclass(frozen=True)
class Budget:
    """A limit on the sum of `amount` over all layers.

    `text` is what was given and `quantity` what it limits. A total t is shown to people as (t + `offset`) / `per`, in `unit`.
    """

    text: str
    quantity: str
    amount: Amount
    limit: int
    offset: int = 0
    per: int = 1
    unit: str = ""

    def show(self, total: int) -> str:
        """A total in people's words, rounded up in the fourth decimal, so that a plan with this total meets what is shown."""
        whole, decimals = divmod(ceil(Fraction(total + self.offset, self.per) * 10**4), 10**4)
        return f"{whole}.{decimals:04d}".rstrip("0").rstrip(".") + self.unit


@dataclass(frozen=True)
class Whole:
    """What is known of the whole file and of no layer's bits: its bytes beside the layers, and measured latencies where there are some."""

    rest_bytes: int
    latencies: LatencyTable | None = None


def parse_budget(text: str, scope: Scope, whole: Whole) -> list[Budget]:
    """Reads one `--budget`: "4.0", "4.0/8.0", "size=3.2MB", "bops=1.5G", "like=4" or "latency=4.0ms".

    Args:
        text: the budget as given.
        scope: the layers, and which of them are fixed.
        whole: what the file is beside its layers, and the latencies.

    Raises:
        UsageError: anything else.
        InputError: a latency, where there is no table.
    """
    kind, equals, value = text.strip().partition("=")
    if not equals:
        return _average(text, scope)
    if kind not in BUDGETS:
        raise UsageError(f"budget {text!r} is of no known kind; {ACCEPTED}")
    return BUDGETS[kind](text, value, scope, whole)


def average_amounts(scope: Scope, everything: bool = False) -> tuple[tuple[Amount, int], tuple[Amount, int]]:
    """What the averages are made of: (amount, divisor) of weights, then of activations.

    Weights average over the parameters and activations over the MACs (a matmul counted once) of the searched layers, or of all.
    """
    counted = {layer.name for layer in scope.layers if everything or layer.name not in scope.fixed}
    parameters = sum(layer.parameters for layer in scope.layers if layer.name in counted and layer.has_weight)
    macs = sum(layer.macs for layer in scope.layers if layer.name in counted)

    def weight_amount(layer: Layer, weight_bits: int | None, activation_bits: int) -> int:
        return layer.parameters * weight_bits if weight_bits is not None and layer.name in counted else 0

    def activation_amount(layer: Layer, weight_bits: int | None, activation_bits: int) -> int:
        return layer.macs * activation_bits if layer.name in counted else 0

    return (weight_amount, parameters), (activation_amount, macs)


def bit_operations(layer: Layer, weight_bits: int | None, activation_bits: int) -> int:
    """BitOps of one layer for one image: MACs x weight bits x activation bits; MACs x bits^2 for a matmul."""
    return layer.macs * (activation_bits if weight_bits is None else weight_bits) * activation_bits


def total(amount: Amount, widths: Iterable[Widths]) -> int:
    """The exact sum of an amount over layers at their widths."""
    return sum(amount(*entry) for entry in widths)


def average_limits(budgets: Sequence[str]) -> tuple[Fraction | None, Fraction | None]:
    """The smallest average of weights and of activations that the texts ask for, None where none does."""
    pairs = [_average_numbers(text) for text in budgets if "=" not in text]
    return (min(pair[0] for pair in pairs), min(pair[1] for pair in pairs)) if pairs else (None, None)


def _average_numbers(text: str) -> tuple[Fraction, Fraction]:
    weights, slash, activations = text.strip().partition("/")
    return _number(weights, text), _number(activations if slash else weights, text)


def _average(text: str, scope: Scope) -> list[Budget]:
    budgets = []
    for kind, number, (amount, divisor) in zip(("weight", "activation"), _average_numbers(text), average_amounts(scope), strict=True):
        if divisor:
            budgets.append(Budget(text, f"average {kind} bits", amount, floor(number * divisor), per=divisor))
    return budgets


def _size(text: str, value: str, scope: Scope, whole: Whole) -> list[Budget]:
    number, unit = _number_and_unit(value, text, {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9})
    return [Budget(text, "size", stored_bytes, floor(number * unit) - whole.rest_bytes, offset=whole.rest_bytes, per=10**6, unit="MB")]


def _bops(text: str, value: str, scope: Scope, whole: Whole) -> list[Budget]:
    number, unit = _number_and_unit(value, text, {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12})
    return [Budget(text, "BitOps", bit_operations, floor(number * unit), per=10**9, unit="G")]


def _like(text: str, value: str, scope: Scope, whole: Whole) -> list[Budget]:
    """At most the size and the BitOps of the uniform plan with the same fixed layers, so that only the searched ones are compared."""
    uniform = scope.uniform(*parse_widths(value, f"budget {text!r}"))
    return [
        Budget(text, "size", stored_bytes, total(stored_bytes, uniform), offset=whole.rest_bytes, per=10**6, unit="MB"),
        Budget(text, "BitOps", bit_operations, total(bit_operations, uniform), per=10**9, unit="G"),
    ]


def _latency(text: str, value: str, scope: Scope, whole: Whole) -> list[Budget]:
    number, unit = _number_and_unit(value, text, {"us": 10**3, "ms": 10**6, "s": 10**9})
    if whole.latencies is None:
        raise InputError(f"budget {text!r} needs measured latencies, and none are given; run `vitq bench --layers` on this machine first")
    rest = whole.latencies.rest_nanoseconds
    return [Budget(text, "latency", whole.latencies.nanoseconds, floor(number * unit) - rest, offset=rest, per=10**6, unit="ms")]


BUDGETS: dict[str, Callable[[str, str, Scope, Whole], list[Budget]]] = {"size": _size, "bops": _bops, "like": _like, "latency": _latency}


def _number_and_unit(value: str, text: str, units: dict[str, int]) -> tuple[Fraction, int]:
    number, unit = re.fullmatch(r"(.*?)\s*([A-Za-z]*)", value, re.DOTALL).groups()  # type: ignore[union-attr]
    known = {name.upper(): size for name, size in units.items()}
    if unit.upper() not in known:
        named = ", ".join(unit or "none" for unit in units)
        named += " (1 K is 1000)" if "K" in named else ""
        raise UsageError(f"budget {text!r}: unit {unit or 'none'!r} is not known; give one of {named}, or {ACCEPTED}")
    return _number(number, text), known[unit.upper()]


def _number(number: str, text: str) -> Fraction:
    if not re.fullmatch(r"\d{1,30}(\.\d{1,30})?", number, re.ASCII):
        raise UsageError(f"budget {text!r}: {number!r} is not a decimal number; {ACCEPTED}")
    return Fraction(number)
