"""The trace of the Fisher information without LampQ's scales of the types: its metric with idea 2 left out, for the ablation.

    cost(l, b) = gamma^-b tr(F_l)

Traces of different types differ in size for reasons that have nothing to do with damage, which is LampQ's point (lampq.py).
"""

from vitq.artifacts import CostTable
from vitq.importance.costs import by_width
from vitq.importance.lampq import fisher_traces
from vitq.importance.subject import Subject


def fisher_trace(subject: Subject) -> CostTable:
    """Prices every layer by the trace of its Fisher information; errors as those of `lampq`.

    Returns:
        Costs that rank ("relative"); `importance` is the trace.
    """
    return by_width(subject, fisher_traces(subject))
