"""Where the lines of a picture run: values to points of an SVG whose viewBox is `width` x `height`. The template draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitq.artifacts import Staircase
from vitq.report.findings import Bars


@dataclass(frozen=True)
class Axis:
    """A scale from values in [low, high] to the points from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The point of a value, kept within a little beyond the axis."""
        low, high, value = (math.log10(end) for end in (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        share = (value - low) / ((high - low) or 1.0)
        return round(self.start + min(max(share, -0.02), 1.02) * (self.end - self.start), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values with their points: steps of 1, 2 or 5, and of powers of ten where that were too many."""
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high) + 1e-9)
            parts = (1, 2, 5) if last - first < 3 else (1,)
            values = [part * 10.0**power for power in range(first, last + 1) for part in parts]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) or 1.0))
            step = next(step * part for part in (0.1, 0.2, 0.5, 1, 2) if (self.high - self.low) / (step * part) <= 7)
            values = [step * count for count in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        return [(self.at(value), f"{value:.6g}") for value in values if self.low <= value * (1 + 1e-9) and value <= self.high * (1 + 1e-9)]


@dataclass(frozen=True)
class Point:
    """A mark with its name."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Steps:
    """The staircase: its line, equal bits everywhere as marks, the chosen plan, and both axes' ticks."""

    width: int
    height: int
    left: int
    bottom: int
    line: str
    uniform: tuple[Point, ...]
    chosen: Point | None
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def steps(staircase: Staircase, chosen: tuple[float, float] | None) -> Steps:
    """Predicted cost over the average of bits that is allowed.

    Args:
        staircase: with one plan at least.
        chosen: the average bits of the plan and what it is predicted to cost; None where that cannot be told.
    """
    width, height, left, right, top, bottom = 480, 300, 56, 466, 14, 262
    points = [(step.budget, step.objective) for step in (*staircase.plans, *staircase.uniform)] + ([chosen] if chosen else [])
    bits, costs = [x for x, _ in points], [y for _, y in points]
    logarithmic = min(costs) > 0 and max(costs) > min(costs)
    across = Axis(min(bits), max(bits), left + 8, right)
    up = Axis(min(costs), max(costs), bottom - 8, top, logarithmic)
    path = ""
    for step in staircase.plans:
        x, y = across.at(step.budget), up.at(step.objective)
        path += f"H{x}V{y}" if path else f"M{x} {y}"
    uniform = tuple(Point(across.at(step.budget), up.at(step.objective), f"{step.budget:g}") for step in staircase.uniform)
    mark = Point(across.at(chosen[0]), up.at(chosen[1]), f"{chosen[0]:.2f} bits, {chosen[1]:.3g}") if chosen else None
    return Steps(width, height, left, bottom, f"{path}H{right}", uniform, mark, across.ticks(), up.ticks())


@dataclass(frozen=True)
class Outline:
    """A histogram as one closed outline, the logarithm of its counts as height, with marks below for a quantizer's levels."""

    width: int
    height: int
    base: int
    path: str
    levels: tuple[float, ...]
    zero: float | None
    low: str
    high: str


def outline(bars: Bars, levels: Sequence[float] = ()) -> Outline:
    """The outline of a histogram; counts are shown by their logarithm, since what hurts are the few values far out."""
    width, height, base = 300, 92, 84
    low, high = min(bars.low, *levels, bars.low), max(bars.high, *levels, bars.high)
    across = Axis(low, high, 2, width - 2)
    tallest = math.log1p(max(bars.counts, default=0.0)) or 1.0
    step = (bars.high - bars.low) / max(len(bars.counts), 1)
    path = f"M{across.at(bars.low)} {base}"
    for number, count in enumerate(bars.counts):
        path += f"V{round(base - (base - 4) * math.log1p(count) / tallest, 2)}H{across.at(bars.low + step * (number + 1))}"
    inside = low <= 0 <= high
    marks = tuple(across.at(level) for level in levels)
    return Outline(width, height, base, f"{path}V{base}Z", marks, across.at(0.0) if inside else None, f"{low:.3g}", f"{high:.3g}")


@dataclass(frozen=True)
class Whisker:
    """An estimate and its interval as shares of a picture's width, 0 to 100."""

    low: float
    middle: float
    high: float


def whiskers(intervals: Sequence[tuple[float, float, float]]) -> list[Whisker]:
    """(low, estimate, high) of several rows on one axis, a little wider than all of them."""
    lowest, highest = min((low for low, _, _ in intervals), default=0.0), max((high for _, _, high in intervals), default=0.0)
    margin = 0.05 * (highest - lowest) or 1.0
    axis = Axis(lowest - margin, highest + margin, 0, 100)
    return [Whisker(*map(axis.at, interval)) for interval in intervals]
