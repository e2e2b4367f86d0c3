"""The staircase: what each average of bits would cost at the least, and where the chosen plan stands."""

import math
from dataclasses import dataclass

from vitq.allocation import Wishes, lay_out
from vitq.allocation.summary import summarize_plan, widths_of
from vitq.artifacts import BitPlan, Profile, Staircase
from vitq.errors import VitqError
from vitq.report import pictures
from vitq.report.findings import Findings, Lacking


@dataclass(frozen=True)
class StaircaseSection:
    """The staircase's picture, and what each of its plans comes to."""

    picture: pictures.Steps
    staircase: Staircase
    chosen: tuple[float, float] | None
    why_not: str


def staircase(findings: Findings) -> StaircaseSection | Lacking:
    """The best plan at each average, and the chosen one where it can be priced alike."""
    found = findings.staircase
    if found is None or not found.plans:
        return Lacking(f"vitq allocate{findings.option} --pareto {findings.quoted('staircase.json')}")
    chosen, why_not = None, "no plan is chosen yet"
    if findings.chosen is not None:
        try:
            chosen, why_not = _price(findings.chosen, found, findings.profile), ""
        except VitqError as error:
            why_not = str(error)
        if chosen is None and not why_not:
            why_not = "this staircase was made from another profile, or with other options than can be told"
    return StaircaseSection(pictures.steps(found, chosen), found, chosen, why_not)


def _price(plan: BitPlan, found: Staircase, profile: Profile | None) -> tuple[float, float] | None:
    """(average bits, predicted cost) of a plan by the staircase's own prices; None where these are not the profile's."""
    if profile is None:
        return None
    plan.check(profile.layers)
    search = lay_out(profile, Wishes(found.metric, bits_apart=found.bits_apart, objective=found.objective))
    first = found.plans[0]
    if set(first.layers) != {layer.name for layer in profile.layers}:
        return None
    entries = tuple(
        entry.model_copy(update={"weight_bits": first.layers[entry.name][0], "activation_bits": first.layers[entry.name][1]})
        for entry in plan.layers
    )
    again = search.objective.total(widths_of(plan.model_copy(update={"layers": entries}), profile))
    if not math.isclose(again, first.objective, rel_tol=1e-6, abs_tol=1e-12):
        return None
    sums = summarize_plan(plan, profile)
    averages = [sums[f"average_{kind}_bits"] for kind in ("weight", "activation")]
    return max(average for average in (*averages, 0.0) if average is not None), search.objective.total(widths_of(plan, profile))
