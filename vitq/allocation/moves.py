"""Plans near a plan: what may move by one bit, where it leads, and whether the budgets still hold.

What moves together is a *unit*: a group of layers that read one tensor with everything that is tied to it, or, with bits apart, a
group's activations and each weight for itself. Fixed widths do not move.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitq.allocation.budgets import Budget, total
from vitq.allocation.choices import Scope, Widths

Bits = Mapping[str, tuple[int | None, int]]
"""(weight bits or None, activation bits) by layer name."""


@dataclass(frozen=True)
class Unit:
    """What moves together: the layers whose weight bits, and those whose activation bits, are one number."""

    weights: tuple[str, ...]
    activations: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first of its layers, with what of it moves."""
        if not self.activations:
            return f"{self.weights[0]} (weight)"
        return self.activations[0] if self.weights or len(self.activations) == 1 else f"{self.activations[0]} (activations)"


@dataclass(frozen=True)
class Moves:
    """The neighbourhood of plans: candidate widths ascending, the budgets that have to hold, and the units in order of name."""

    scope: Scope
    budgets: tuple[Budget, ...]
    candidates: tuple[int, ...]
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, scope: Scope, budgets: Sequence[Budget], candidates: Sequence[int], bits_apart: bool) -> "Moves":
        """Finds the units of a scope."""
        units: list[Unit] = []
        for position, group in enumerate(scope.groups):
            if position in scope.imposed and not bits_apart:
                continue
            free = tuple(layer.name for layer in group if layer.has_weight and layer.name not in scope.fixed)
            readers = tuple(layer.name for layer in group)
            if not bits_apart:
                units.append(Unit(free, readers))
                continue
            units += [Unit((), readers)] if position not in scope.imposed else []
            units += [Unit((name,), ()) for name in free]
        return cls(scope, tuple(budgets), tuple(sorted(candidates)), tuple(units))

    def width(self, bits: Bits, unit: Unit) -> int:
        """The width that a unit has."""
        width = bits[unit.activations[0]][1] if unit.activations else bits[unit.weights[0]][0]
        assert width is not None
        return width

    def moved(self, bits: Bits, unit: Unit, steps: int) -> Bits | None:
        """The bits with a unit so many candidate widths higher (lower, where negative); None where there is none."""
        width = self.width(bits, unit)
        if width not in self.candidates or not 0 <= (index := self.candidates.index(width) + steps) < len(self.candidates):
            return None
        new = self.candidates[index]
        changed = {name: (new if name in unit.weights else bits[name][0], bits[name][1]) for name in unit.weights}
        changed |= {name: (changed.get(name, bits[name])[0], new) for name in unit.activations}
        return {**bits, **changed}

    def meets(self, bits: Bits) -> bool:
        """Whether every budget holds, in exact integers."""
        widths = [Widths(layer, *bits[layer.name]) for layer in self.scope.layers]
        return all(total(budget.amount, widths) <= budget.limit for budget in self.budgets)
