"""What relaxing each budget buys: its shadow price, from the duals of the relaxation, and the cheapest layer to spend it on.

A price is the slope of the proven bound, so it holds for small changes; the plan itself moves in steps of whole widths. The cheapest layer
is the one whose next width saves most for what it takes from this budget, all other layers as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import floor, log10
from typing import Any

from vitq.allocation.budgets import Budget, total
from vitq.allocation.choices import Scope, Widths
from vitq.allocation.objectives import Objective


def shadow_prices(
    scope: Scope,
    widths: Sequence[Widths],
    budgets: Sequence[tuple[Budget, float]],
    objective: Objective,
    candidates: Sequence[int],
    bits_apart: bool,
    unit: str,
) -> list[dict[str, Any]]:
    """An entry for each budget, in the order of the budgets.

    Args:
        scope: the layers.
        widths: the chosen plan.
        budgets: what was asked for, and what one more of its whole units saves.
        objective: what was minimised.
        candidates: the widths that layers may have.
        bits_apart: whether weights and activations have widths of their own.
        unit: what costs are in.

    Returns:
        `per_unit` is what one `unit` (bit, MB, G BitOps) more saves and `buys` what a `step` of units does, both predicted and 0 where the
        budget does not bind; `raise` names the cheapest layer and its width before and after (None: no layer saves anything); `text`
        says so in words.
    """
    chosen = {entry.layer.name: entry for entry in widths}
    raises = list(_raises(scope, chosen, candidates, bits_apart))
    gains = [_gain(objective, chosen, changed) for _, changed in raises] if any(price for _, price in budgets) else []
    binding = [budget.quantity for budget, price in budgets if price]
    found = []
    for budget, price in budgets:
        measure, step = budget.unit.strip() or "bit", _step(budget)
        per_unit = price * budget.per
        best = max(
            ((gain / extra, -at) for at, gain in enumerate(gains) if (extra := _extra(budget, chosen, raises[at][1])) > 0 and gain > 0),
            default=None,
        )
        named = raises[-best[1]][0] if best and price else None
        plural = f"{step:g} {measure}" if measure != "G" else f"{step:g} G BitOps"
        if price:
            text = f"{plural} more buys {per_unit * step:.2g} {unit}"
            text += f"; the cheapest layer to raise is {named['layer']} {named['from']} -> {named['to']}" if named else ""
        else:
            text = "does not bind: more of it buys nothing"
            text += f", as {_tied(binding)}" if binding and not bits_apart and not budget.unit else ""
        entry = {"budget": budget.text, "quantity": budget.quantity, "unit": measure, "per_unit": per_unit}
        found.append(entry | {"step": step, "buys": per_unit * step, "raise": named, "text": text})
    return found


def _tied(binding: Sequence[str]) -> str:
    """Why an average is not reached: where widths are tied it rises with what another budget allows."""
    return f"weights and activations have one width a layer, and {' and '.join(binding)} {'bind' if len(binding) > 1 else 'binds'}"


def _step(budget: Budget) -> float:
    """0.1 bit; of other budgets the power of ten that is 0.5 to 5 % of them."""
    size = Fraction(budget.limit + budget.offset, budget.per)
    return 0.1 if not budget.unit or size <= 0 else 10.0 ** floor(log10(size / 20))


def _raises(
    scope: Scope, chosen: Mapping[str, Widths], candidates: Sequence[int], bits_apart: bool
) -> Iterator[tuple[dict[str, Any], list[Widths]]]:
    """Every way to give one layer, with those that must follow, its next width: (its name and widths, the changed entries)."""
    for position, group in enumerate(scope.groups):
        entries = [chosen[layer.name] for layer in group]
        before = entries[0].activation_bits
        wider = [bits for bits in sorted(candidates) if bits > before]
        if wider and position not in scope.imposed:
            tied = set() if bits_apart else {layer.name for layer in group if layer.has_weight and layer.name not in scope.fixed}
            changed = [Widths(layer, wider[0] if layer.name in tied else weight_bits, wider[0]) for layer, weight_bits, _ in entries]
            where = " (input)" if bits_apart and group[0].has_weight else ""
            yield {"layer": group[0].name + where, "from": before, "to": wider[0]}, changed
        for layer, weight_bits, activation_bits in entries if bits_apart else []:
            wider = [bits for bits in sorted(candidates) if weight_bits is not None and bits > weight_bits]
            if wider and layer.name not in scope.fixed:
                yield {"layer": f"{layer.name} (weight)", "from": weight_bits, "to": wider[0]}, [Widths(layer, wider[0], activation_bits)]


def _gain(objective: Objective, chosen: Mapping[str, Widths], changed: Sequence[Widths]) -> float:
    """How much less the plan costs with the changed entries."""
    after = {entry.layer.name: entry for entry in changed}
    if objective.pairs:
        return objective.total(chosen.values()) - objective.total((dict(chosen) | after).values())
    return objective.total(chosen[name] for name in after) - objective.total(changed)


def _extra(budget: Budget, chosen: Mapping[str, Widths], changed: Sequence[Widths]) -> int:
    """How much more the changed entries take from a budget."""
    return total(budget.amount, changed) - total(budget.amount, [chosen[entry.layer.name] for entry in changed])
