"""Classify pictures with a file that vitq exported; needs numpy, Pillow and onnxruntime, nothing else. Copy it into your service.

    python examples/serve.py vitq-run/model.onnx cat.jpg dog.jpg

prints the five most probable classes of each. How to prepare a picture and what the classes are called stand in the file's metadata.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Classifier:
    """An exported file, ready to run."""

    def __init__(self, path: str) -> None:
        if not Path(path).is_file():
            sys.exit(f"{path} does not exist; give a file that `vitq export` wrote")
        try:
            self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own types are not public
            sys.exit(f"{path} cannot be loaded: {str(error).splitlines()[0]}; give a file that `vitq export` wrote")
        metadata = self._session.get_modelmeta().custom_metadata_map
        if "vitq.session_options" in metadata:  # of `vitq export --attention-int8`: slower without
            options = onnxruntime.SessionOptions()
            for key, value in json.loads(metadata["vitq.session_options"]).items():
                options.add_session_config_entry(key, value)
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        if "vitq.preprocessing" not in metadata:
            sys.exit(f"{path} does not say how to prepare images; give a file that `vitq export` wrote")
        self.preprocessing = json.loads(metadata["vitq.preprocessing"])
        num_classes = json.loads(metadata["vitq.num_classes"])
        if not num_classes:
            sys.exit(f"{path} gives features and no classes; give the file of a classifier")
        self.labels = json.loads(metadata["vitq.label_names"]) or [f"class {index}" for index in range(num_classes)]

    def probabilities(self, image: Image.Image) -> np.ndarray:
        """The probability of each class, float64 (classes,)."""
        size = self._session.get_inputs()[0].shape[0]  # a number where the file takes batches of that size only
        images = preprocess(image, self.preprocessing)[None].repeat(size if isinstance(size, int) else 1, axis=0)
        (logits,) = self._session.run(["output"], {"images": images})
        exponentials = np.exp(logits[0].astype(np.float64) - logits[0].max())
        return exponentials / exponentials.sum()


def preprocess(image: Image.Image, config: dict) -> np.ndarray:
    """A picture as the model wants it, float32 (C, H, W), from timm's description: what its evaluation transform does."""
    channels, height, width = config["input_size"]
    crop_pct, crop_mode = config.get("crop_pct") or 0.875, config.get("crop_mode") or "center"
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: the high byte
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    size = resized(image.width, image.height, math.floor(width / crop_pct), math.floor(height / crop_pct), crop_mode)
    image = image.resize(size, Image.Resampling[config.get("interpolation", "bilinear").upper()])
    fill = [round(255 * value) for value in config["mean"]] if crop_mode == "border" else [0] * channels
    image = crop_or_pad(image, width, height, tuple(fill) if channels > 1 else fill[0])
    pixels = np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.array(config[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def resized(width: int, height: int, to_width: int, to_height: int, crop_mode: str) -> tuple[int, int]:
    """Width and height before the crop: both as wanted (squash), or one of them, the other by the picture's proportions."""
    if crop_mode == "squash":
        return to_width, to_height
    if crop_mode == "center" and to_width == to_height:
        return (to_width, int(to_width * height / width)) if width <= height else (int(to_height * width / height), to_height)
    ratio = (max if crop_mode == "border" else min)(width / to_width, height / to_height)
    return round(width / ratio), round(height / ratio)


def crop_or_pad(image: Image.Image, width: int, height: int, fill: int | tuple[int, ...]) -> Image.Image:
    """The middle of a picture, on a ground of one colour where the picture is smaller."""
    left, top = (
        (wanted - given) // 2 if wanted > given else -round((given - wanted) / 2)
        for wanted, given in ((width, image.width), (height, image.height))
    )
    canvas = Image.new(image.mode, (width, height), fill)
    canvas.paste(image, (left, top))
    return canvas


def main() -> None:
    """Prints the five most probable classes of each picture."""
    if len(sys.argv) < 3:
        sys.exit("usage: python serve.py MODEL.onnx PICTURE [PICTURE ...]")
    classifier = Classifier(sys.argv[1])
    for path in sys.argv[2:]:
        try:
            with Image.open(Path(path)) as image:
                probabilities = classifier.probabilities(image)
        except OSError as error:
            sys.exit(f"{path} cannot be read: {error.strerror or error}")
        print(path)
        for index in np.argsort(-probabilities, kind="stable")[:5]:
            print(f"  {100 * probabilities[index]:6.2f} %  {classifier.labels[index]}")


if __name__ == "__main__":
    main()
