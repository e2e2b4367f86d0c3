"""A plan made better by changing the options of one choice or of two at once, where pairs of options cost something together.

With x the plan as 0 and 1 over all options and G the symmetric matrix of what they cost together (what one costs alone on the diagonal),
a change d of the plan changes its cost by  2 d^T G x + d^T G d.  Of all changes of one or two choices that keep every budget, the best
one is made until none helps. All pairs of changes are priced in one matrix, (options - choices)^2. Left out: three choices at once.
"""

from collections.abc import Sequence

import numpy as np

from vitq.allocation.choices import ChoiceTree
from vitq.allocation.solver import Row

_NEGLIGIBLE = 1e-12  # of the plan's cost: an improvement that may be rounding


def swap(tree: ChoiceTree, matrix: np.ndarray, rows: Sequence[Row], taken: Sequence[int]) -> tuple[int, ...]:
    """The options, ascending, of a plan that no change of two choices improves.

    Args:
        tree: the options and the choices, none of which hangs under an option.
        matrix: G, float64 (options, options), symmetric.
        rows: the budgets, which the given plan meets.
        taken: the options of the plan to start from.
    """
    choice_of = np.empty(len(tree.options), int)
    for position, choice in enumerate(tree.choices):
        choice_of[list(choice.options)] = position
    amounts = np.array([row.amounts for row in rows], object).reshape(len(rows), len(tree.options))  # Python's integers: exact
    limits = [row.limit for row in rows]
    current = np.array(sorted(taken, key=lambda option: choice_of[option]))
    while True:
        new = np.setdiff1d(np.arange(len(tree.options)), current)
        old = current[choice_of[new]]
        to_plan = matrix[:, current].sum(axis=1)
        alone = 2 * (to_plan[new] - to_plan[old]) + matrix[new, new] + matrix[old, old] - 2 * matrix[new, old]
        between = matrix[np.ix_(new, new)] - matrix[np.ix_(new, old)] - matrix[np.ix_(old, new)] + matrix[np.ix_(old, old)]
        together = alone[:, None] + alone + 2 * between
        together[choice_of[new][:, None] == choice_of[new]] = np.inf
        np.fill_diagonal(together, alone)  # a change of one choice
        for amount, limit in zip(amounts, limits, strict=True):
            more, left = amount[new] - amount[old], limit - int(sum(amount[current]))
            over = more[:, None] + more > left
            np.fill_diagonal(over, more > left)
            together[over.astype(bool)] = np.inf
        if not together.size or together.min() >= -_NEGLIGIBLE * abs(to_plan[current].sum()):
            return tuple(sorted(int(option) for option in current))
        for change in set(np.unravel_index(together.argmin(), together.shape)):
            current[choice_of[new[change]]] = new[change]
