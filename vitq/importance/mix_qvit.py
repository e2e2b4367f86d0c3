"""Mix-QViT's cost (arXiv 2501.06357): a layer's quantization sensitivity weighted by its relevance.

    C_{l,b} = S_{l,b} / mean_k S_{k,b_min} * I_l / mean(I)

S is the sensitivity (sensitivity.py), b_min the smallest width, I the relevance of layer-wise relevance propagation.

Differs from the paper: it does not give how the two are joined; the product is our choice. An operand's share of a cost is that of the
sensitivity.
"""

from collections.abc import Mapping

import numpy as np

from vitq.artifacts import CostTable
from vitq.importance.lrp import lrp
from vitq.importance.sensitivity import sensitivity
from vitq.importance.subject import Subject


def mix_qvit(subject: Subject) -> CostTable:
    """Prices every layer by its sensitivity times its relevance, the `importance` of `lrp`.

    Raises:
        UsageError, InputError: as `sensitivity` and `lrp` do.
    """
    return combine(sensitivity(subject), lrp(subject).importance)


def combine(measured: CostTable, relevance: Mapping[str, float], eta: float = 1.0) -> CostTable:
    """The costs of a table, scaled to a mean of 1 at the smallest width, times (I_l / mean I)^eta.

    Args:
        measured: the sensitivities.
        relevance: I by layer name, not negative.
        eta: 0 leaves the relevance out.

    Returns:
        Costs that rank ("relative").
    """
    scale = float(np.mean([costs[0] for costs in measured.tied.values()])) or 1.0
    mean = float(np.mean([relevance[name] for name in measured.tied])) or 1.0
    factors = {name: (max(relevance[name], 0.0) / mean) ** eta / scale for name in measured.tied}

    def scaled(costs: Mapping[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
        return {name: tuple(factors[name] * cost for cost in row) for name, row in costs.items()}

    return CostTable(
        unit="relative",
        bits=measured.bits,
        tied=scaled(measured.tied),
        weight=scaled(measured.weight),
        activation=scaled(measured.activation),
        cross={name: tuple(tuple(factors[name] * cost for cost in row) for row in rows) for name, rows in measured.cross.items()},
    )
