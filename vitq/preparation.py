"""How a model's images are prepared, in one line for people, and what of it a config.json may say; what prepares them loads torch."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitq.errors import InputError

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


def refuse_unusable(config: Mapping[str, Any], file: Path) -> None:
    """Raises InputError, naming file and field, for preprocessing in a model's config that no image could go through; None is none."""
    for field, (usable, accepted) in _FIELDS.items():
        if (value := config.get(field)) is not None and not usable(value):
            raise InputError(f"{file}: `{field}` is {value!r:.80}; give {accepted}, or take the field out for timm's default")
    channels = config["input_size"][0] if config.get("input_size") else None
    for field in ("mean", "std"):
        if channels and config.get(field) and len(config[field]) not in (1, channels):
            raise InputError(
                f"{file}: `{field}` has {len(config[field])} numbers, but `input_size` {channels} channels; give one a channel"
            )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30  # neither NaN nor infinite


def _all(values: Any, usable: Callable[[Any], bool]) -> bool:
    return isinstance(values, list | tuple) and len(values) > 0 and all(map(usable, values))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (lambda value: _all(value, lambda it: type(it) is int and it > 0) and len(value) == 3, "[channels, height, width]"),
    "mean": (lambda value: _all(value, _number), "a list of numbers, one a channel"),
    "std": (lambda value: _all(value, lambda it: _number(it) and it > 0), "a list of numbers above 0, one a channel"),
    "crop_pct": (lambda value: _number(value) and 0.01 <= value <= 10, "a number from 0.01 to 10, such as 0.9"),
    "interpolation": (_INTERPOLATIONS.__contains__, f"one of {', '.join(_INTERPOLATIONS)}"),
    "crop_mode": (_CROP_MODES.__contains__, f"one of {', '.join(_CROP_MODES)}"),
}
"""What a field may be, and that in words."""


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
