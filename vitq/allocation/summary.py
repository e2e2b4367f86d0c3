"""What a plan amounts to: averages, bytes, BitOps and how these compare with uniform bits; exact until the last division.

Left out: measuring; sizes are predicted from shapes and widths, a latency from a table of measured ones.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from math import floor
from typing import Any

from vitq.allocation.budgets import Amount, Whole, average_amounts, average_limits, bit_operations, total
from vitq.allocation.choices import Scope, Widths, settle
from vitq.allocation.sizes import stored_bytes
from vitq.artifacts import WIDTHS, BitPlan, Profile
from vitq.latency import LatencyTable


def summarize(scope: Scope, widths: Sequence[Widths], whole: Whole, budgets: Sequence[str]) -> dict[str, Any]:
    """Averages in bits, the predicted `size_bytes` of the packed file, `bops` for one image, and both relative to uniform bits.

    The uniform plan that it is compared with has the same fixed layers and the same average: the one that the budgets ask for where
    they do, else the achieved one. Where that is not whole, it lies on the line between the uniform plans of the widths beside it.
    An average over nothing is None. With measured latencies there is the predicted `latency_ms` too.
    """
    weight, activation = (_average(pair, widths) for pair in average_amounts(scope))
    weight_all, activation_all = (_average(pair, widths) for pair in average_amounts(scope, everything=True))
    size, bops = whole.rest_bytes + total(stored_bytes, widths), total(bit_operations, widths)
    asked = average_limits(budgets)
    level = [_level(number, achieved) for number, achieved in zip(asked, (weight, activation), strict=True)]
    uniform_size = whole.rest_bytes + _uniform_total(stored_bytes, scope, *level)
    uniform_bops = _uniform_total(bit_operations, scope, *level)
    found = {
        "average_weight_bits": _number(weight),
        "average_activation_bits": _number(activation),
        "average_weight_bits_all": _number(weight_all),
        "average_activation_bits_all": _number(activation_all),
        "size_bytes": size,
        "bops": bops,
        "relative_to_uniform": {
            "weight_bits": float(level[0]),
            "activation_bits": float(level[1]),
            "size": _number(size / uniform_size if uniform_size else None),
            "bops": _number(bops / uniform_bops if uniform_bops else None),
        },
    }
    if whole.latencies is not None:
        found["latency_ms"] = (whole.latencies.rest_nanoseconds + total(whole.latencies.nanoseconds, widths)) / 10**6
    return found


def summarize_plan(plan: BitPlan, profile: Profile, latencies: LatencyTable | None = None) -> dict[str, Any]:
    """What `summarize` says of a plan, from its layers alone: it may have been edited since its `summary` was written.

    Raises:
        InputError: the plan does not fit the profile's layers.
    """
    plan.check(profile.layers)
    kept = (entry for entry in plan.layers if entry.name in plan.fixed)
    fixed = [f"{entry.name}={entry.weight_bits or entry.activation_bits}/{entry.activation_bits}" for entry in kept]
    return summarize(settle(profile.layers, fixed), widths_of(plan, profile), Whole(profile.rest_bytes, latencies), ())


def widths_of(plan: BitPlan, profile: Profile) -> tuple[Widths, ...]:
    """The layers of a profile at the widths of a plan that fits it."""
    bits = plan.bits
    return tuple(Widths(layer, bits[layer.name].weight_bits, bits[layer.name].activation_bits) for layer in profile.layers)


def _average(pair: tuple[Amount, int], widths: Iterable[Widths]) -> Fraction | None:
    amount, divisor = pair
    return Fraction(total(amount, widths), divisor) if divisor else None


def _level(asked: Fraction | None, achieved: Fraction | None) -> Fraction:
    """The average to compare at; a budget above the widest or below the narrowest width says nothing."""
    if asked is not None and WIDTHS[0] <= asked <= WIDTHS[-1]:
        return asked
    return achieved if achieved is not None else Fraction(WIDTHS[-1])


def _uniform_total(amount: Amount, scope: Scope, weight_bits: Fraction, activation_bits: Fraction) -> Fraction:
    """The amount of the uniform plan, linear between whole widths in each of the two."""
    result = Fraction(0)
    for weight_width, weight_share in _beside(weight_bits):
        for activation_width, activation_share in _beside(activation_bits):
            result += weight_share * activation_share * total(amount, scope.uniform(weight_width, activation_width))
    return result


def _beside(bits: Fraction) -> list[tuple[int, Fraction]]:
    """The whole widths beside a number of bits, with their shares."""
    lower = floor(bits)
    return [(lower, 1 + lower - bits)] + ([(lower + 1, bits - lower)] if bits > lower else [])


def _number(value: Fraction | None) -> float | None:
    return None if value is None else float(value)
