"""The staircase of optimal plans of one profile: what the least cost is at every average number of bits, and a picture of it.

The options are laid out and priced once; only the limits change from step to step. A step allows an average of k bits of weights and of
activations alike. Steps are a tenth of a bit from the smallest to the largest average that is reachable, and the whole widths among
them; a plan that is no better than the one before is no new step. Each plan is proven within `GAP`.
Left out: staircases over size or BitOps alone, whose values every step has beside its average.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from vitq.allocation.allocate import Search, Wishes, lay_out
from vitq.allocation.choices import Widths, in_words_and_numbers
from vitq.allocation.summary import summarize
from vitq.artifacts import Profile
from vitq.errors import UsageError

GAP = 1e-3
STEP = Fraction(1, 10)

Progress = Callable[[float, float, str], None]
"""Is told the work done, all of it, and what is done."""


def pareto(profile: Profile, wishes: Wishes | None = None, gap: float | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """The best plan for each average of bits.

    Args:
        profile: the layers and what their bits cost.
        wishes: as for `allocate`, with its errors. A preset takes all widths, as none is named; with `paper_parity` the papers' layers
            have the whole bits of each step's average.
        gap: (objective - bound) / |objective| at which to stop with each plan; by default `GAP`.
        progress: called with (steps done, all of them, what is done).

    Returns:
        A JSON document: `plans`, cheapest budget first, each with `budget` (average bits), `average_weight_bits`,
        `average_activation_bits`, `size_bytes`, `bops`, `objective`, `bound`, `gap` and `layers` (name -> [weight bits, activation bits]);
        and `uniform`, the same for equal bits everywhere without a proof. `unit` is that of the objective.
    """
    wishes = wishes or Wishes()
    search = lay_out(profile, replace(wishes, paper_parity=False))
    searches: dict[int, Search] = {}

    def at(level: int) -> Search:
        """The search whose fixed layers are those of plans of `level` bits."""
        if not wishes.paper_parity:
            return search
        if level not in searches:
            searches[level] = lay_out(profile, replace(wishes, bits=search.candidates), uniform=str(level))
        return searches[level]

    plans: list[dict[str, Any]] = []
    averages = _averages(search)
    for done, average in enumerate(averages):
        if progress:
            progress(done, len(averages), f"{float(average):.1f} bits")
        text, here = f"{float(average):.2f}", at(int(average))
        solution = here.solve(here.limits([text]), GAP if gap is None else gap)
        if solution is not None and (not plans or solution.objective < plans[-1]["objective"]):
            proof = {"bound": solution.bound, "gap": (solution.objective - solution.bound) / max(abs(solution.objective), 1e-12)}
            plans.append(_entry(here, float(average), here.widths(solution), solution.objective) | proof)
    uniform = [_entry(at(k), k, widths := at(k).scope.uniform(k, k), at(k).objective.total(widths)) for k in search.candidates]
    named = {"metric": search.metric, "objective": search.objective_name, "unit": search.unit, "bits_apart": search.bits_apart}
    named |= {"paper_parity": True} if wishes.paper_parity else {}
    return {"format": "vitq-pareto/1"} | named | {"plans": plans, "uniform": uniform}


def draw(staircase: dict[str, Any], kind: str) -> bytes:
    """A picture of the staircase, `kind` svg or png: predicted cost over average bits, beside uniform bits.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("the plot needs matplotlib, which is not installed; run `pip install 'vitq[plots]'`") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    at, height = ([plan[key] for plan in staircase["plans"]] for key in ("budget", "objective"))
    axes.step(at, height, where="post", label="optimal")
    axes.plot(*([plan[key] for plan in staircase["uniform"]] for key in ("budget", "objective")), "o--", label="uniform")
    positive = all(plan["objective"] > 0 for plan in staircase["plans"] + staircase["uniform"])
    axes.set_yscale("log" if positive else "linear")
    axes.set_xlabel("average bits allowed, weights and activations")
    axes.set_ylabel(f"predicted loss, {staircase['metric']} ({staircase['unit']})")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    # No date and no random ids, so that equal staircases have equal pictures.
    with matplotlib.rc_context({"svg.hashsalt": "vitq"}):
        figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return picture.getvalue()


def as_json(staircase: dict[str, Any]) -> str:
    """The document as text, byte-identical for equal staircases."""
    return json.dumps(staircase, indent=1, allow_nan=False) + "\n"


def _averages(search: Search) -> list[Fraction]:
    """The steps from the narrowest candidate to the widest; widths that a fixed layer imposes on others may lie beyond it."""
    first, last = search.candidates[0], max(search.candidates[-1], *search.scope.imposed.values(), 0)
    return [first + step * STEP for step in range(int((last - first) / STEP) + 1)]


def _entry(search: Search, budget: float, widths: Sequence[Widths], objective: float) -> dict[str, Any]:
    summary = summarize(search.scope, widths, search.whole, [])
    kept = {key: summary[key] for key in ("average_weight_bits", "average_activation_bits", "size_bytes", "bops")}
    ordered = sorted(widths, key=lambda entry: in_words_and_numbers(entry.layer.name))
    layers = {layer.name: [weight_bits, activation_bits] for layer, weight_bits, activation_bits in ordered}
    return {"budget": budget} | kept | {"objective": objective, "layers": layers}
