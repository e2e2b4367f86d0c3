"""Whether to trust a metric on a model: what it predicts for plans of one budget against what they measure.

Random plans of one budget cost much the same: a plan's loss is a sum over all layers, in which chance averages out. So a rank
correlation needs many images, else it is about them: two halves of the images, asked for the plans' order, tell how far it can be trusted.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy.stats import spearmanr

from vitq.allocation.moves import Bits, Moves

Loss = Callable[[Bits], float]
"""From a plan's bits to a loss."""

Losses = Callable[[Bits], Sequence[float]]
"""From a plan's bits to the loss of each image that it is measured on."""


@dataclass(frozen=True)
class Audit:
    """The plans' names, and what each was predicted to cost and measured to cost, in the loss's unit.

    `correlation` is Spearman's, over the random plans and the chosen one, `compared` in all (all of one budget, so that it is about the
    metric and not about the budget); None where there are fewer than three, or all of one loss. `repeatability` is Spearman's too, over the
    same plans, of what one half of the images measures with what the other half does: no metric can be expected to do much better.
    """

    names: tuple[str, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    correlation: float | None
    compared: int
    repeatability: float | None

    @property
    def ratio(self) -> float:
        """Measured over predicted loss of the chosen plan."""
        return self.measured[0] / max(self.predicted[0], 1e-12)


def audit(chosen: Bits, uniform: Bits | None, moves: Moves, count: int, predict: Loss, measure: Losses, seed: int = 0) -> Audit:
    """Measures the chosen plan, so many random plans of its budgets, and the uniform one.

    Args:
        chosen: the plan under audit; it meets the budgets.
        uniform: the uniform plan of the same average, None where there is none.
        moves: the units that may move, and the budgets.
        count: how many random plans.
        predict: the metric's loss of a plan.
        measure: the real one, image by image.
        seed: of the random plans.
    """
    source = random.Random(seed)
    randoms = [random_plan(moves, chosen, source) for _ in range(count)]
    plans = [("chosen", chosen), *((f"random {index}", bits) for index, bits in enumerate(randoms, start=1))]
    plans += [("uniform", uniform)] if uniform is not None else []
    predicted = [predict(bits) for _, bits in plans]
    losses = np.array([measure(bits) for _, bits in plans], dtype=float)
    measured = [fmean(row) for row in losses]
    compared = slice(count + 1)
    correlation = _spearman(predicted[compared], measured[compared])
    halves = [losses[compared, half::2].mean(1).tolist() for half in (0, 1)] if losses.shape[1] > 1 else [[], []]
    return Audit(tuple(name for name, _ in plans), tuple(predicted), tuple(measured), correlation, count + 1, _spearman(*halves))


def random_plan(moves: Moves, start: Bits, source: random.Random) -> Bits:
    """A plan that spends the budgets at random: from widths as narrow as they may be, units picked by chance rise until none can.

    `start` meets the budgets. Narrower widths do too, but for a latency: below 8 bits an activation costs a Clip.
    """
    bits = start
    for unit in moves.units:
        while (narrower := moves.moved(bits, unit, -1)) is not None and moves.meets(narrower):
            bits = narrower
    rising = list(moves.units)
    while rising:
        unit = source.choice(rising)
        wider = moves.moved(bits, unit, 1)
        if wider is None or not moves.meets(wider):
            rising.remove(unit)
        else:
            bits = wider
    return bits


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:  # all alike: there is no order to agree on
        return None
    return float(spearmanr(a, b)[0])  # type: ignore[arg-type]
