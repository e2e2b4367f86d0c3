"""From an entry of a source to what the model takes, and from a picture to a file.

What Pillow opens becomes RGB as timm makes it, upright by its EXIF tag. An entry that is no picture, is cut off or too large becomes a
reason in words.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from vitq.images.preprocessing import MAX_PIXELS
from vitq.images.sources import Entry
from vitq.whole import refuse_existing, write_whole

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # whatever the file is called; others may start programs (EPS)


@dataclass(frozen=True)
class Items(Dataset[tuple[Tensor | None, int, str]]):
    """One item an entry: (image or None, label, what is wrong with it). `scale` is the pixels that the short side is resized to."""

    entries: list[Entry]
    labels: list[int]
    read: Callable[[Entry], Image.Image | Tensor]
    mode: str
    transform: Callable[[Image.Image], Tensor]
    scale: float

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str]:
        entry = self.entries[index]
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's remarks on odd metadata
                picture = self.read(entry)
                if isinstance(picture, Tensor):
                    return picture, self.labels[index], ""
                if self.scale**2 * max(picture.size) / min(picture.size) > MAX_PIXELS:
                    raise ValueError(f"{picture.width}x{picture.height} is too long to be resized")
                return self.transform(picture.convert(self.mode)), self.labels[index], ""
        except Exception as error:  # Pillow raises anything on damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            return None, self.labels[index], f"{entry.name}: {reason}"


def read_file(entry: Entry) -> Image.Image:
    """The picture in an entry's bytes, upright; raises anything that Pillow does where it is none."""
    if entry.size is None or entry.size < 0:
        raise OSError("gone, or no regular file")
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        data = file.read(entry.size)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise OSError("no image" if data else "empty file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"announces {image.width}x{image.height} pixels, more than {MAX_PIXELS}")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip at 255; the high byte is what it takes of 16-bit colours
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image


def read_row(entry: Entry) -> Image.Image | Tensor:
    """An entry's row of an images.safetensors: a picture, or float32 (C, H, W), preprocessed; raises ValueError where it is not finite."""
    with safe_open(entry.file, "pt") as file:
        image: Tensor = file.get_slice("images")[entry.offset : entry.offset + 1][0]
    if image.dtype == torch.uint8:
        return Image.fromarray((image.permute(1, 2, 0) if image.shape[0] == 3 else image).contiguous().numpy())
    if not bool(torch.isfinite(image).all()):
        raise ValueError("NaN or infinity")
    return image


def collate(items: list[tuple[Tensor | None, int, str]]) -> tuple[Tensor | None, Tensor, list[str]]:
    """(images or None where none is good, labels, faults): stacked where they are decoded, so that a worker hands over one tensor."""
    good = [(image, label) for image, label, _ in items if image is not None]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), [fault for image, _, fault in items if image is None]


def write_png(pixels: np.ndarray, path: str | Path, force: bool = False) -> None:
    """Writes a picture, uint8 (H, W, 3); the file appears whole or not at all.

    Raises:
        UsageError: the file exists and `force` is not set.
    """
    refuse_existing(path, force)
    write_whole(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))
