"""A model's own preprocessing: timm's transform, checked before it is used, and in one line for people."""

import math
from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor

from vitq.errors import InputError

MAX_PIXELS = 89_478_485
"""The largest picture that is decoded, or made by resizing, in pixels: from here on Pillow suspects a decompression bomb."""

_FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def transform_of(data_config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """From a picture to float32 (C, H, W), as timm does it; raises InputError where it cannot be built or gives another shape."""
    config = {name: data_config[name] for name in _FIELDS if data_config.get(name) is not None}
    try:
        channels, height, width = config["input_size"]
        if height * width > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS} pixels")
        transform: Any = create_transform(**config, is_training=False)
        shape = tuple(transform(Image.new("L" if channels == 1 else "RGB", (width, height))).shape)
    except Exception as error:  # the config may come from any checkpoint
        raise InputError(f"the preprocessing {data_config} cannot be built: {error!r:.200}; correct the model's config") from None
    if shape != (channels, height, width):
        raise InputError(f"the preprocessing {data_config} gives images of shape {shape}, not input_size; correct the model's config")
    return transform


def mode_of(data_config: dict[str, Any]) -> str:
    """Pillow's name for the colours that the model takes: RGB, or L, grayscale."""
    return "L" if data_config["input_size"][0] == 1 else "RGB"


def scale_of(data_config: dict[str, Any]) -> float:
    """The pixels that a picture's short side is resized to."""
    return max(data_config["input_size"][1:]) / (data_config.get("crop_pct") or 0.875)


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
