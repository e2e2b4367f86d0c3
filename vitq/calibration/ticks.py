"""How far a recipe is that goes from layer to layer, where it makes no pass over the images that would say so."""

from collections.abc import Callable
from itertools import count

from vitq.calibration.blocks import Progress


def tick(progress: Progress | None, whole: int, name: str) -> Callable[[], None]:
    """What is to be called after each of `whole` pieces of work of this name."""
    done = count(1)
    return lambda: progress(next(done), whole, name) if progress else None
