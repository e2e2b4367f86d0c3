"""What a paper does, as the options of an allocation that say so; `--preset NAME` gives them, and explicit options win.

| preset | metric | objective | candidate bits at MPk | paper |
| --- | --- | --- | --- | --- |
| lampq | lampq | gamma, Omega 4^-b | k-2 to k+2 | arXiv 2511.10004 |
| mix-qvit | mix-qvit | mix-qvit | k-1 to k+2 | arXiv 2501.06357 |
| lrp-qvit | lrp | gamma, I 4^-b | k-1 to k+2 | arXiv 2401.11243 |

All within 2 to 8 bits. MPk is `--budget like=k`: no larger and no more BitOps than k bits everywhere. The papers give neither the
candidates nor gamma, and of the budget only the average; `like=k` is what makes plans equal in cost, and so comparable. Left out:
LampQ's refinement afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vitq.artifacts import WIDTHS, CostTable
from vitq.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """The metric and objective of a paper, and its candidate bits: from k + `below` to k + `above`."""

    metric: str
    objective: str
    below: int
    above: int

    def bits(self, budgets: Sequence[str]) -> list[int] | None:
        """The candidates for the widths k that `like=k` and average budgets name; None where none does."""
        named = [part for text in budgets if "=" not in text or text.startswith("like=") for part in text.rpartition("=")[2].split("/")]
        levels = [float(part) for part in named if part.strip().replace(".", "", 1).isdecimal()]
        if not levels:
            return None
        return [width for width in WIDTHS if min(levels) + self.below <= width <= max(levels) + self.above]


PRESETS = {
    "lampq": Preset("lampq", "gamma", -2, 2),
    "mix-qvit": Preset("mix-qvit", "mix-qvit", -1, 2),
    "lrp-qvit": Preset("lrp", "gamma", -1, 2),
}


def find_preset(name: str, costs: dict[str, CostTable], metric: str | None) -> Preset:
    """The preset of that name.

    Args:
        name: a key of `PRESETS`.
        costs: the cost tables of the profile.
        metric: a metric that was asked for and wins over the preset's.

    Raises:
        UsageError: there is no such preset, or the profile lacks its metric and none was asked for.
    """
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is not known; give one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if metric is None and preset.metric not in costs:
        raise UsageError(
            f"preset {name!r} minimises metric {preset.metric!r}, which is not in the profile (it has {', '.join(costs) or 'none'}); "
            f"run `vitq profile --metric {preset.metric}` first"
        )
    return preset
