"""Cost tables from arrays: costs that never rise with the width, and those of metrics that have one number a layer.

What a layer costs with both operands quantized is split between them where a metric does not price them apart.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from vitq.artifacts import WIDTHS, CostTable
from vitq.importance.subject import Subject

GAMMA = 4.0
"""By how much a bit divides a cost that is made of one number a layer: it halves the step, and the cost goes with its square."""


def falling(costs: ArrayLike) -> tuple[float, ...]:
    """The closest costs that never rise with the width, negative ones then set to 0."""
    fitted = isotonic_regression(np.asarray(costs, dtype=float), increasing=False).x
    return tuple(float(value) for value in np.maximum(fitted, 0.0))


def table(
    subject: Subject,
    unit: Literal["nats", "accuracy", "relative"],
    weight: Mapping[str, ArrayLike],
    activation: Mapping[str, ArrayLike],
    tied: Mapping[str, ArrayLike] | None = None,
    importance: Mapping[str, float] | None = None,
) -> CostTable:
    """The cost table of what was measured, one value a width of `subject.bits`.

    Args:
        subject: what is priced.
        unit: of the costs.
        weight: the weight's costs, by layer name; those of matmuls are not read.
        activation: the inputs' costs, by layer name.
        tied: the costs of weight and inputs together; their sum where not given.
        importance: the one number a layer that the costs are made of, if they are.
    """
    layers = subject.graph.layers
    zero = np.zeros(len(subject.bits))
    weights = {layer.name: np.asarray(weight[layer.name]) if layer.has_weight else zero for layer in layers}
    both = tied or {layer.name: weights[layer.name] + np.asarray(activation[layer.name]) for layer in layers}
    return CostTable(
        unit=unit,
        bits=tuple(width for width in WIDTHS if width in subject.bits),
        tied={layer.name: falling(both[layer.name]) for layer in layers},
        weight={layer.name: falling(weights[layer.name]) for layer in layers if layer.has_weight},
        activation={layer.name: falling((activation if layer.has_weight else both)[layer.name]) for layer in layers},
        importance={layer.name: float(importance[layer.name]) for layer in layers} if importance else {},
    )


def split(subject: Subject, tied: Mapping[str, ArrayLike], share: Mapping[str, float]) -> tuple[dict[str, ArrayLike], dict[str, ArrayLike]]:
    """The costs of the weights and of the inputs, whose sum is `tied`; `share` in [0, 1] of a layer goes to its weight."""
    parts = {layer.name: share[layer.name] if layer.has_weight else 0.0 for layer in subject.graph.layers}
    weight: dict[str, ArrayLike] = {name: part * np.asarray(tied[name]) for name, part in parts.items()}
    activation: dict[str, ArrayLike] = {name: (1 - part) * np.asarray(tied[name]) for name, part in parts.items()}
    return weight, activation


def by_width(subject: Subject, importance: Mapping[str, float], share: Mapping[str, float] | None = None) -> CostTable:
    """Costs importance_l GAMMA^-b, of which `share` (a half by default) falls to the weight; unit "relative"."""
    tied = {name: value * GAMMA ** -np.array(subject.bits, dtype=float) for name, value in importance.items()}
    weight, activation = split(subject, tied, share or dict.fromkeys(importance, 0.5))
    return table(subject, "relative", weight, activation, tied, importance)
