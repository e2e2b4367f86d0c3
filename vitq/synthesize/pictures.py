"""Preprocessed images as pictures: bytes, the file that `--images` reads, and a sheet to look at.

    pixel = round(255 (x std + mean))

A file's pictures are as large as what the preprocessing crops from, their edges repeated around them, so that it resizes nothing and cuts
out the very pixels that were made.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vitq.whole import refuse_existing, write_whole

_SHEET_SIDE = 96  # pixels that a picture of the sheet has at least
_GAP = 2


def pixels(images: Tensor, data_config: dict[str, Any]) -> Tensor:
    """uint8 (N, 3, H, W) of preprocessed images, float32 (N, C, H, W); a grey model's in three equal channels."""
    mean, std = _mean_and_std(data_config)
    return (255 * (images.cpu() * std + mean)).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def preprocessed(pictures: Tensor, data_config: dict[str, Any]) -> Tensor:
    """What the model sees of pictures, uint8 (N, 3, H, W): float32 (N, C, H, W)."""
    mean, std = _mean_and_std(data_config)
    return (pictures[:, : len(mean)] / 255 - mean) / std


def bounds(data_config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What black and white are to the model: float32 (C, 1, 1) each."""
    mean, std = _mean_and_std(data_config)
    return -mean / std, (1 - mean) / std


def framed(pictures: Tensor, data_config: dict[str, Any]) -> Tensor:
    """Pictures, uint8 (N, 3, H, W), with their edges repeated to the size that the preprocessing crops from."""
    margins: list[tuple[int, int]] = []
    for extent in pictures.shape[2:]:
        whole = max(extent, math.floor(extent / (data_config.get("crop_pct") or 0.875)))
        before = round((whole - extent) / 2)  # as torchvision's center crop
        margins.append((before, whole - extent - before))
    return torch.from_numpy(np.pad(pictures.numpy(), [(0, 0), (0, 0), *margins], mode="edge"))


def save(pictures: Tensor, labels: Tensor | None, made_from: dict[str, Any], path: str | Path, force: bool = False) -> None:
    """Writes an images.safetensors, whole or not at all.

    Args:
        pictures: uint8 (N, 3, H, W).
        labels: int64 (N,), or None.
        made_from: JSON values, kept in the header.
        path: the file.
        force: replace an existing one.

    Raises:
        UsageError: the file exists and `force` is not set.
        InputError: it cannot be written.
    """
    refuse_existing(path, force)
    tensors = {"images": pictures.contiguous()} | ({} if labels is None else {"labels": labels.contiguous()})
    # One entry only: safetensors writes several in any order, and the same images are to be the same bytes.
    metadata = {"made_from": json.dumps(made_from, sort_keys=True)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def sheet(pictures: Tensor) -> np.ndarray:
    """All pictures, uint8 (N, 3, H, W), on one, uint8 (H, W, 3): in rows, on white, small ones enlarged."""
    count, _, height, width = pictures.shape
    columns, times = math.ceil(math.sqrt(count)), math.ceil(_SHEET_SIDE / min(height, width))
    rows, down, across = math.ceil(count / columns), times * height + _GAP, times * width + _GAP
    whole = np.full((rows * down + _GAP, columns * across + _GAP, 3), 255, np.uint8)
    for index, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        top, left = index // columns * down + _GAP, index % columns * across + _GAP
        enlarged = picture.repeat(times, 0).repeat(times, 1)
        whole[top : top + down - _GAP, left : left + across - _GAP] = enlarged
    return whole


def _mean_and_std(data_config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(data_config[name], dtype=torch.float32)[:, None, None] for name in ("mean", "std"))
    return mean, std
