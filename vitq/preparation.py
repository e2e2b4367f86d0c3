"""How a model's images are prepared, in one line for people; apart from what prepares them, which loads torch."""

import math
from typing import Any

from vitq.errors import InputError


def describe(data_config: dict[str, Any]) -> str:
    """The preprocessing in one line for people; raises InputError where a file has something else in its place."""
    try:
        return _described(data_config)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise InputError(f"the preprocessing {data_config!r:.200} cannot be read: {error!r:.100}; correct the model's config") from None


def _described(data_config: dict[str, Any]) -> str:
    channels, height, width = data_config["input_size"]
    crop_pct = data_config.get("crop_pct") or 0.875
    side = {"squash": "both sides", "border": "the long side"}.get(data_config.get("crop_mode") or "center", "the short side")
    resized = "x".join(str(math.floor(extent / crop_pct)) for extent in dict.fromkeys((height, width)))
    mean, std = (", ".join(f"{value:.4g}" for value in data_config[key]) for key in ("mean", "std"))
    colours = {1: "grayscale", 3: "RGB"}.get(channels, f"{channels} channels")
    crop = "pad" if side == "the long side" else "center crop"
    resize = f"resize {side} to {resized} ({data_config.get('interpolation')})"
    return f"{colours}, {resize}, {crop} to {height}x{width}, in [0, 1] minus mean ({mean}) over std ({std})"
