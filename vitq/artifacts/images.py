"""What an images.safetensors says of itself, read from its header: no image is, and no torch is loaded."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def describe_images(path: str | Path) -> dict[str, Any] | None:
    """What an images.safetensors holds: `num_images`, `shape` of an image as stored, `labelled`, `made_from`; None for any other file."""
    try:
        with safe_open(path, "np") as file:
            if "images" not in (names := set(file.keys())):
                return None
            count, *shape = file.get_slice("images").get_shape()
            known = json.loads((file.metadata() or {}).get("made_from", "{}"))
    except (SafetensorError, OSError, ValueError):
        return None  # whoever reads the file says what is wrong with it
    made_from = {name: value for name, value in known.items() if isinstance(value, dict)} if isinstance(known, dict) else {}
    return {"num_images": count, "shape": shape, "labelled": "labels" in names, "made_from": made_from}
