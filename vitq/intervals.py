"""How sure a share is that was counted on a number of images."""

import math

_Z = 1.959963984540054  # the normal distribution's 97.5 % quantile

COUNTED = ("top1", "top5", "agreement")
"""The measures of an evaluation that are shares of its images."""


def wilson(percent: float, num_images: int) -> tuple[float, float]:
    """The 95 % confidence interval of a counted share, both ends in percent: Wilson's, which stays in [0, 100] and holds at the ends.

        (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        percent: the share of images that were counted.
        num_images: n, all of them, at least 1.
    """
    p, n = percent / 100, num_images
    middle = p + _Z**2 / (2 * n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    whole = 1 + _Z**2 / n
    return max(0.0, 100 * (middle - half) / whole), min(100.0, 100 * (middle + half) / whole)
