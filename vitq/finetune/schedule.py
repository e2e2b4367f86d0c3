"""How far a run is, and what that makes of its learning rates.

    progress p: 0 at first, after each step p + (1 - p) / (steps that are left), so that it is 1 after the last one
    rate: its full value times p / warmup below `warmup`, then half a cosine down to 0

The number of steps that are left may be set anew on the way, when they turn out to take longer than was thought: progress goes on from
where it is, and the cosine still ends at 0. Progress and steps left are all the state there is.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """`taken` steps were taken, `left` steps are left, `progress` is in [0, 1], `seconds` were spent."""

    left: int
    taken: int = 0
    progress: float = 0.0
    seconds: float = 0.0

    def stepped(self) -> "Schedule":
        """After one more step."""
        return replace(self, left=self.left - 1, taken=self.taken + 1, progress=self.progress + (1 - self.progress) / self.left)

    def factor(self, warmup: float) -> float:
        """What rates are multiplied with in the step that comes next, in (0, 1]; `warmup` is the part of the progress that warms up."""
        p = self.progress + (1 - self.progress) / (2 * self.left)  # the step's middle: neither the first nor the last one is idle
        if p < warmup:
            return p / warmup
        return (1 + math.cos(math.pi * (p - warmup) / (1 - warmup))) / 2


def steps_within(seconds: float, each: float, steps: int) -> int:
    """As many steps as the seconds have room for, `each` taking so many; at least one, at most `steps`."""
    return max(1, min(steps, int(seconds / max(each, 1e-9))))
