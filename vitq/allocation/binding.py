"""A latency that is a budget: less than the best plan of an average of bits takes, and more than the fastest plan of that average."""

from dataclasses import replace

from vitq.allocation.allocate import Wishes, lay_out
from vitq.allocation.budgets import total
from vitq.artifacts import Profile
from vitq.latency import LatencyTable

_APART = 0.01
"""By what part the two have to differ: measured latencies are not known better."""


def binding_latency(profile: Profile, latencies: LatencyTable, average: str = "4.0") -> float | None:
    """The milliseconds half way between both; None where the two are as good as the same, or no plan has that average.

    Args:
        profile: the layers and what their bits cost.
        latencies: what each layer takes, of the same graph.
        average: of bits, as a budget has it.

    Raises:
        InputError: a profile without layers or costs; latencies of another model.
    """
    search = lay_out(profile, Wishes(), [average], latencies=latencies)
    limits = search.limits([average])
    nanoseconds = tuple(float(total(latencies.nanoseconds, option)) for option in search.tree.options)
    found = [plan.solve(limits) for plan in (search, replace(search, costs=nanoseconds, products={}))]
    best, fastest = (
        None if plan is None else (latencies.rest_nanoseconds + sum(nanoseconds[option] for option in plan.taken)) / 10**6 for plan in found
    )
    if best is None or fastest is None or not fastest < (1 - _APART) * best:
        return None
    return (best + fastest) / 2
