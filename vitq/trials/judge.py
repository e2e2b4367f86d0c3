"""An allocation put to the test: the plan refined by measuring, and its metric audited."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any

from vitq.allocation import Allocation
from vitq.allocation.allocate import Search
from vitq.allocation.budgets import average_limits
from vitq.allocation.choices import Widths
from vitq.allocation.moves import Bits, Moves
from vitq.allocation.summary import summarize
from vitq.artifacts import BitPlan
from vitq.errors import UsageError
from vitq.trials.audit import Audit, audit
from vitq.trials.refine import Errors, Refinement, refine


@dataclass(frozen=True)
class Judge:
    """What plans of one search and its budgets are judged by: the metric's prediction and `measure`, the real loss, image by image."""

    search: Search
    budgets: Sequence[str]
    measure: Callable[[BitPlan], Sequence[float]]

    @cached_property
    def moves(self) -> Moves:
        """The plans around a plan. Raises UsageError where there are no budgets to keep to."""
        if not self.budgets:
            raise UsageError("--refine and --audit compare plans of one budget; give --budget in place of --uniform")
        return Moves.of(self.search.scope, self.search.limits(self.budgets), self.search.candidates, self.search.bits_apart)

    def refined(self, chosen: Allocation, errors: Errors) -> tuple[Allocation, Refinement]:
        """The allocation after LampQ's update, and what was tried.

        Its report is that of the plan it has become: `bound` holds for every plan within the budgets, and `gap` is the distance to it.
        Shadow prices are left out where the plan changed, since they are those of the best predicted plan.
        """
        found = refine(_bits(chosen.plan), self.moves, errors, lambda bits: fmean(self.measure(_with_bits(chosen.plan, bits))))
        measured: dict[str, Any] = {"start": found.start, "loss": found.loss, "steps": [vars(step) for step in found.steps]}
        if not any(step.kept for step in found.steps):
            return replace(chosen, report={**chosen.report, "refinement": measured}), found
        widths = self._widths(found.bits)
        objective, bound = self.search.objective.total(widths), chosen.report["bound"]
        sums = summarize(self.search.scope, widths, self.search.whole, self.budgets)
        sums |= {"objective": objective, "gap": (objective - bound) / max(abs(objective), 1e-12)}
        sums |= {"status": "refined by measuring", "predicted": objective, "shadow_prices": []}
        plan = _with_bits(chosen.plan, found.bits)
        plan = plan.model_copy(update={"summary": {**chosen.plan.summary, **sums}})
        return replace(chosen, plan=plan, report={**chosen.report, **sums, "refinement": measured}), found

    def audited(self, chosen: Allocation, count: int, seed: int) -> Audit:
        """The chosen plan, so many random ones of its budgets and the uniform one: predicted against measured."""
        return audit(
            _bits(chosen.plan),
            self._uniform(),
            self.moves,
            count,
            lambda bits: self.search.objective.total(self._widths(bits)),
            lambda bits: self.measure(_with_bits(chosen.plan, bits)),
            seed,
        )

    def _uniform(self) -> Bits | None:
        """The uniform plan at the whole widths of the average that is asked for; None where no average is, or it is no width."""
        asked = average_limits([text.removeprefix("like=") for text in self.budgets])
        levels = [int(level) for level in asked if level is not None and level >= 2]
        if len(levels) < 2 or max(levels) > 8:
            return None
        return {layer.name: (weight, activation) for layer, weight, activation in self.search.scope.uniform(*levels)}

    def _widths(self, bits: Bits) -> tuple[Widths, ...]:
        return tuple(sorted((Widths(layer, *bits[layer.name]) for layer in self.search.scope.layers), key=lambda entry: entry.layer.name))


def _bits(plan: BitPlan) -> Bits:
    return {entry.name: (entry.weight_bits, entry.activation_bits) for entry in plan.layers}


def _with_bits(plan: BitPlan, bits: Bits) -> BitPlan:
    layers = tuple(
        entry.model_copy(update={"weight_bits": bits[entry.name][0], "activation_bits": bits[entry.name][1]}) for entry in plan.layers
    )
    return plan.model_copy(update={"layers": layers})
