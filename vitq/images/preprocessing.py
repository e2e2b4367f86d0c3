"""A model's own preprocessing: timm's transform, checked before it is used."""

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
