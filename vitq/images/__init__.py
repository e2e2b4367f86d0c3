"""Images -> batches: a folder, a tar or an `images.safetensors`, through timm's readers and the model's own preprocessing.

The list of images and its digest are fixed on opening; pixels are read on every pass, one batch at a time, so memory does not grow with
their number. A file that is no image, is cut off or announces a picture too large to decode is left out and named; more than 5 % of
such files is an error. What a source holds and in which order: sources.py; from a file's bytes to what the model takes: pictures.py.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor
from torch.utils.data import DataLoader

from vitq.errors import InputError
from vitq.images.pictures import Items, collate, read_file, read_row, write_png
from vitq.images.preprocessing import mode_of, scale_of, transform_of
from vitq.images.sources import Entry, folder_entries, labels_of, row_entries, tar_entries
from vitq.units import counted

__all__ = ["Batch", "Images", "open_images", "read_image", "refuse_missing", "write_png"]

MAX_BAD = 0.05
"""The largest share of the listed images that may be unreadable."""

Batch = tuple[Tensor, Tensor | None]


@dataclass
class Images:
    """A fixed list of images; every pass over it gives the same batches in the same order.

    A batch is (images, float32 (B, 3, H, W), preprocessed; labels, int64 (B,), or None where `labelled` is False). B is the batch size
    less what had to be skipped. Labels index `class_names`, where names are known. `num_listed` counts the chosen images; `skipped`
    names those that could not be read in the passes so far, each once, with the reason. `digest` is the sha256 of the chosen names and
    sizes (of an images.safetensors: of the file and the chosen rows).
    """

    source: str
    data_config: dict[str, Any]
    num_listed: int
    digest: str
    labelled: bool
    class_names: tuple[str, ...]
    loader: "DataLoader[Any]" = field(repr=False)
    skipped: list[str] = field(default_factory=list)
    progress: Callable[[int, int], None] | None = field(default=None, repr=False)

    @property
    def num_images(self) -> int:
        """The images that could be read; final after the first whole pass."""
        return self.num_listed - len(self.skipped)

    def __iter__(self) -> Iterator[Batch]:
        """One pass, as `batches`, that reports to `progress` where that is set."""
        return self.batches(self.progress)

    def batches(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Batch]:
        """One pass that reports (images done, images listed) after each batch.

        Raises:
            InputError: more than 5 % of the listed images cannot be read.
        """
        done = 0
        for images, labels, faults in self.loader:
            done += len(faults) + (0 if images is None else len(images))
            self.skip(faults)
            if images is not None:
                yield images, labels if self.labelled else None
            if progress is not None:
                progress(done, self.num_listed)

    def skip(self, faults: Sequence[str]) -> None:
        """Adds images that cannot be read to `skipped`; raises InputError where they are more than 5 % of the listed ones."""
        self.skipped += [fault for fault in faults if fault not in self.skipped]
        if len(self.skipped) > MAX_BAD * self.num_listed:
            count = f"{len(self.skipped)} of {counted(self.num_listed, 'image')} cannot be read, more than {MAX_BAD:.0%}"
            raise InputError(f"{self.source}: {count}: {'; '.join(self.skipped[:5])}. Remove or replace them")


def open_images(
    source: str | Path,
    data_config: dict[str, Any],
    num_images: int | None = 256,
    seed: int = 0,
    batch_size: int = 32,
    workers: int = 0,
    class_names: tuple[str, ...] = (),
) -> Images:
    """Lists the images of a source and chooses a subset; decodes none yet.

    Args:
        source: A folder of class folders, a flat folder, a .tar of either, or an images.safetensors: `images`, uint8 (N, 3, H, W) or
            (N, H, W, 3), or float32 (N, 3, H, W) preprocessed already; optionally `labels`, int64 (N,), of the model's classes.
        data_config: The model's preprocessing as timm writes it: input_size, mean, std, interpolation, crop_pct, crop_mode.
        num_images: How many to choose; None, or as many as there are, takes all of them in order.
        seed: Chooses the subset and its order; the same seed and names give the same list everywhere, a smaller one its beginning.
        batch_size: Images a batch.
        workers: Processes that decode; 0 decodes in this one.
        class_names: The model's label names. Class folders that all bear such names get the model's indices; where none does, labels
            index the sorted folder names. There are labels where every image lies in one of several class folders.

    Raises:
        InputError: the source is missing, damaged or without images, its class folders are only partly the model's, or the
            preprocessing cannot be built.
    """
    path = Path(source)
    transform = transform_of(data_config)
    if any(value is not None and value < least for value, least in ((num_images, 1), (batch_size, 1), (workers, 0))):
        raise InputError(f"{num_images} images in batches of {batch_size} with {workers} workers cannot be read; give at least 1, 1 and 0")
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".tar"):
        entries = folder_entries(path) if path.is_dir() else tar_entries(path)
        labels, class_names = labels_of([entry.folder for entry in entries], class_names, str(source))
        read, content = read_file, b""
    elif path.is_file() and path.suffix == ".safetensors":
        entries, labels = row_entries(path, data_config, class_names)
        read = read_row
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
    else:
        refuse_missing(source)
        raise InputError(f"{source} is no source of images; {_ACCEPTED}")
    if not entries:
        raise InputError(f"{source} holds no images ({', '.join(get_img_extensions())}); give a folder or .tar that does")

    chosen: list[int] = list(range(len(entries)))
    if num_images is not None and num_images < len(entries):
        # A hash and not a generator: the same on every platform and version.
        chosen = sorted(chosen, key=lambda i: hashlib.sha256(f"{seed}\0".encode() + entries[i].encoded).digest())[:num_images]
    picked = [entries[i].located() for i in chosen]
    digest = hashlib.sha256(content + b"".join(entry.encoded + f"\0{entry.size}\n".encode() for entry in picked)).hexdigest()
    chosen_labels = [labels[i] for i in chosen] if labels else [0] * len(picked)
    dataset = Items(picked, chosen_labels, read, mode_of(data_config), transform, scale_of(data_config))
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, generator=torch.Generator())
    return Images(str(source), data_config, len(picked), digest, labels is not None, class_names, loader)


def refuse_missing(source: str | Path) -> None:
    """Raises InputError where the source does not exist; reads nothing."""
    if source == "":
        raise InputError(f"the path of the images is empty; {_ACCEPTED}")
    if not Path(source).exists():
        raise InputError(f"{source} does not exist; {_ACCEPTED}")


_ACCEPTED = "give a folder of images, a .tar of one, or an images.safetensors"


def read_image(path: str | Path, data_config: dict[str, Any]) -> Tensor:
    """One picture, preprocessed for the model: float32 (C, H, W).

    Raises:
        InputError: the file is missing or no picture, or the preprocessing cannot be built.
    """
    path = Path(path)
    entry = Entry(path.name, "", path, 0, None).located()
    image, _, fault = Items([entry], [0], read_file, mode_of(data_config), transform_of(data_config), scale_of(data_config))[0]
    if image is None:
        raise InputError(f"{path} cannot be read as a picture ({fault.removeprefix(f'{path.name}: ')}); give a PNG or JPEG file")
    return image
