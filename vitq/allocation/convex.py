"""A bound on all plans, and a plan to start from, where pairs of options cost something together: the form relaxed to a convex one.

A plan x, 0 and 1 over all options, costs x^T G x. With m the smallest eigenvalue of G where that is below 0, else 0, and x_o^2 = x_o,

    x^T G x = x^T (G - m I) x + m C                                 C choices, each with exactly one option taken
           >= 2 y^T (G - m I) x - y^T (G - m I) y + m C             for any y: a convex form lies above its tangents

Two options of one choice are never taken together, so their entries of G are free: they get values with which m is near 0, where G comes
from a convex form.

The right side is linear in x, so that its least over all x in part is a linear program. Frank and Wolfe's method (1956) goes from y towards
that least; the bound is the best that a tangent gives. A plan that is cheap by the last tangent is near the relaxed optimum.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse

from vitq.allocation.choices import ChoiceTree
from vitq.allocation.highs import Program, relax
from vitq.allocation.solver import RELAXED_SCALE, Row

_PROJECTIONS = 30
_STEPS = 200
_CLOSE = 1e-3  # of the relaxed cost: the distance of bound and cost at which to stop


def tangent(tree: ChoiceTree, matrix: np.ndarray, rows: Sequence[Row]) -> tuple[float, np.ndarray]:
    """(What no plan costs less than, the costs of options by the tangent at the relaxed optimum).

    Args:
        tree: the options and the choices, none of which hangs under an option.
        matrix: G, float64 (options, options), symmetric.
        rows: the budgets, which some plan meets.
    """
    form = _completed(tree, matrix)
    shift = min(0.0, float(np.linalg.eigvalsh(form)[0]))
    form, constant = form - shift * np.eye(len(form)), shift * len(tree.choices)
    costs = np.diag(matrix).copy()
    y, bound = _cheapest(tree, rows, costs), -np.inf
    for _ in range(_STEPS):
        costs = 2 * form @ y
        towards = _cheapest(tree, rows, costs) - y
        relaxed, slope, curvature = y @ form @ y, costs @ towards, towards @ form @ towards
        bound = max(bound, relaxed + slope)
        if relaxed - bound <= _CLOSE * relaxed:
            break
        y = y + towards * (1.0 if 2 * curvature <= -slope else -slope / (2 * curvature))
    return float(bound) + constant, costs


def _completed(tree: ChoiceTree, matrix: np.ndarray) -> np.ndarray:
    """G with other entries between options of one choice, so that its smallest eigenvalue is near 0 or above."""
    free = np.zeros(matrix.shape, bool)
    for choice in tree.choices:
        free[np.ix_(choice.options, choice.options)] = True
    np.fill_diagonal(free, False)
    form = matrix
    for _ in range(_PROJECTIONS):
        values, vectors = np.linalg.eigh(form)
        if values[0] >= 0:
            break
        form = np.where(free, (vectors * np.maximum(values, 0.0)) @ vectors.T, matrix)
    return (form + form.T) / 2


def _cheapest(tree: ChoiceTree, rows: Sequence[Row], costs: np.ndarray) -> np.ndarray:
    """The x in part that is cheapest by linear costs."""
    units = [min(1.0, 1e6 / max(row.amounts)) for row in rows]
    at_row, at_column = zip(*((position, option) for position, choice in enumerate(tree.choices) for option in choice.options), strict=True)
    exactly = scipy.sparse.csr_array((np.ones(len(at_row)), (at_row, at_column)), shape=(len(tree.choices), len(costs)))
    spent = np.array([[amount * unit for amount in row.amounts] for row, unit in zip(rows, units, strict=True)], float)
    matrix = scipy.sparse.csr_array(scipy.sparse.vstack([exactly, scipy.sparse.csr_array(spent.reshape(len(rows), len(costs)))]))
    limits = [row.limit * unit for row, unit in zip(rows, units, strict=True)]
    lower = np.concatenate([np.ones(len(tree.choices)), np.full(len(rows), -np.inf)])
    upper = np.concatenate([np.ones(len(tree.choices)), limits])
    scale = RELAXED_SCALE / (float(np.abs(costs).max(initial=0.0)) or 1.0)
    relaxed = relax(Program(costs * scale, matrix, lower, upper, len(costs)))
    assert relaxed is not None, "a plan is known"
    return relaxed.values
