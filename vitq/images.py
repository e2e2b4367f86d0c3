"""Images -> batches: a folder, a tar or an `images.safetensors`, through timm's readers and the model's own preprocessing.

The list of images and its digest are fixed on opening; pixels are read on every pass, one batch at a time, so memory does not grow with
their number. What Pillow opens becomes RGB as timm makes it, upright by its EXIF tag. A file that is no image, is cut off or announces
a picture too large to decode is left out and named; more than 5 % of such files is an error.

Left out: streams, web datasets, extensions other than timm's (.png, .jpg, .jpeg), hidden files and folders.
"""

import hashlib
import io
import math
import stat
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.readers.reader_image_in_tar import extract_tarinfos
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitq.errors import InputError
from vitq.whole import refuse_existing, write_whole

FORMAT = "vitq-images/1"
"""The `format` in the metadata of an images.safetensors whose float32 images are preprocessed already."""

MAX_PIXELS = 89_478_485
"""The largest picture that is decoded, or made by resizing, in pixels: from here on Pillow suspects a decompression bomb."""

MAX_BAD = 0.05
"""The largest share of the listed images that may be unreadable."""

_FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # whatever the file is called; others may start programs (EPS)

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
            count = f"{len(self.skipped)} of {self.num_listed} images cannot be read, more than {MAX_BAD:.0%}"
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
    transform = _transform(data_config)
    if any(value is not None and value < least for value, least in ((num_images, 1), (batch_size, 1), (workers, 0))):
        raise InputError(f"{num_images} images in batches of {batch_size} with {workers} workers cannot be read; give at least 1, 1 and 0")
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".tar"):
        entries = _folder_entries(path) if path.is_dir() else _tar_entries(path)
        labels, class_names = _labels([entry.folder for entry in entries], class_names, str(source))
        read, content = _read_file, b""
    elif path.is_file() and path.suffix == ".safetensors":
        entries, labels = _row_entries(path, data_config, class_names)
        read = _read_row
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
    dataset = _Items(picked, chosen_labels, read, _mode(data_config), transform, _scale(data_config))
    loader = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=_collate, generator=torch.Generator())
    return Images(str(source), data_config, len(picked), digest, labels is not None, class_names, loader)


def refuse_missing(source: str | Path) -> None:
    """Raises InputError where the source does not exist; reads nothing."""
    if not Path(source).exists():
        raise InputError(f"{source} does not exist; {_ACCEPTED}")


_ACCEPTED = "give a folder of images, a .tar of one, or an images.safetensors"


def read_image(path: str | Path, data_config: dict[str, Any]) -> Tensor:
    """One picture, preprocessed for the model: float32 (C, H, W).

    Raises:
        InputError: the file is missing or no picture, or the preprocessing cannot be built.
    """
    path = Path(path)
    entry = _Entry(path.name, "", path, 0, None).located()
    image, _, fault = _Items([entry], [0], _read_file, _mode(data_config), _transform(data_config), _scale(data_config))[0]
    if image is None:
        raise InputError(f"{path} cannot be read as a picture ({fault.removeprefix(f'{path.name}: ')}); give a PNG or JPEG file")
    return image


def write_png(pixels: np.ndarray, path: str | Path, force: bool = False) -> None:
    """Writes a picture, uint8 (H, W, 3); the file appears whole or not at all.

    Raises:
        UsageError: the file exists and `force` is not set.
    """
    refuse_existing(path, force)
    write_whole(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))


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


class _Entry(NamedTuple):
    """One image: its name in the source, the folder that holds it, and where its bytes (or its row of the tensor) are."""

    name: str
    folder: str
    file: Path
    offset: int
    size: int | None

    @property
    def encoded(self) -> bytes:
        return self.name.encode("utf-8", "surrogateescape")

    def located(self) -> "_Entry":
        """With its size in bytes: -1 for what is no regular file, which must not be opened (a pipe would wait for ever)."""
        if self.size is not None:
            return self
        try:
            found = self.file.stat()
        except OSError:
            return self._replace(size=-1)
        return self._replace(size=found.st_size if stat.S_ISREG(found.st_mode) else -1)


def _transform(data_config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
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


def _mode(data_config: dict[str, Any]) -> str:
    return "L" if data_config["input_size"][0] == 1 else "RGB"


def _scale(data_config: dict[str, Any]) -> float:
    """The pixels that a picture's short side is resized to."""
    return max(data_config["input_size"][1:]) / (data_config.get("crop_pct") or 0.875)


def _folder_entries(root: Path) -> list[_Entry]:
    files = [Path(file) for file, _ in find_images_and_targets(str(root), sort=False)[0]]
    entries = [(file.relative_to(root), file) for file in files]
    return _sorted([_Entry(name.as_posix(), name.parent.name, file, 0, None) for name, file in entries])


def _tar_entries(path: Path) -> list[_Entry]:
    try:
        _refuse_cut(path)
        samples = extract_tarinfos(str(path), cache_tarinfo=False, sort=False)[0]  # a cache would be a pickle
    except ValueError:  # timm unpacks an empty list
        return []
    except (OSError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a tar: {error}; make it again, or give the folder") from None
    entries = []
    for member, _, inner in samples:
        within, start = (inner.name.removeprefix("./") + "/", inner.offset_data) if inner is not None else ("", 0)
        name = within + member.name.removeprefix("./")
        folder = PurePosixPath(name).parent.name.removesuffix(".tar")  # as timm: of tars within a tar, each is a class
        entries.append(_Entry(name, folder, path, start + member.offset_data, member.size))
    return _sorted(entries)


def _refuse_cut(path: Path) -> None:
    """Raises tarfile.TarError where a member is to be larger than what is left of the file: timm would look for its end for days."""
    with tarfile.open(path, "r:") as outer:
        for member in outer:
            if member.isfile() and member.name.endswith(".tar"):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    inner.getmembers()


def _sorted(entries: list[_Entry]) -> list[_Entry]:
    """In the order of their names, without hidden files (`._0001.jpg`) and folders (`.ipynb_checkpoints`)."""
    return sorted(entry for entry in entries if not any(part.startswith(".") for part in entry.name.split("/")))


def _labels(folders: list[str], model_names: tuple[str, ...], source: str) -> tuple[list[int] | None, tuple[str, ...]]:
    """A label an image and the names that labels index; (None, ()) where images lie in no class folder, or in one of a foreign name."""
    names = sorted(set(folders), key=lambda name: (natural_key(name), name))
    known = [name for name in names if model_names.count(name) == 1]
    if "" in names or (len(names) == 1 and not known):
        return None, ()
    if known and len(known) < len(names):
        unknown = next(name for name in names if name not in known)
        raise InputError(
            f"{source}: class folder {unknown!r} is none of the model's {len(model_names)} classes, others are ({known[0]!r}); rename it"
        )
    index = {name: model_names.index(name) for name in names} if known else {name: i for i, name in enumerate(names)}
    return [index[folder] for folder in folders], model_names if known else tuple(names)


def _row_entries(path: Path, data_config: dict[str, Any], class_names: tuple[str, ...]) -> tuple[list[_Entry], list[int] | None]:
    """The rows of an images.safetensors and their labels, if it has any."""
    try:
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            images = file.get_slice("images") if "images" in names else None
            shape, dtype = (images.get_shape(), images.get_dtype()) if images is not None else ([], None)
            labels = file.get_tensor("labels") if "labels" in names else None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}; make it again (`vitq synthesize` writes one)") from None
    preprocessed = dtype == "F32" and metadata.get("format") == FORMAT and shape[1:] == list(data_config["input_size"])
    if not preprocessed and not (dtype == "U8" and len(shape) == 4 and 3 in (shape[1], shape[3])):
        accepted = (
            f"uint8 (N, 3, H, W) or (N, H, W, 3), or float32 (N, {', '.join(map(str, data_config['input_size']))}) and format {FORMAT}"
        )
        raise InputError(f"{path}: `images` is {dtype} {shape} with format {metadata.get('format')}; it must be {accepted}")
    rows = [_Entry(f"row {row}", "", path, row, 0) for row in range(shape[0])]
    if labels is None or not rows:
        return rows, None
    if labels.dtype != torch.int64 or labels.shape != (len(rows),) or int(labels.min()) < 0:
        raise InputError(
            f"{path}: `labels` must be int64 ({len(rows)},), 0 or more; it is {labels.dtype} {tuple(labels.shape)}; correct it"
        )
    if class_names and int(labels.max()) >= len(class_names):
        raise InputError(f"{path} holds label {int(labels.max())}, but the model has {len(class_names)} classes; give its own images")
    return rows, labels.tolist()


@dataclass(frozen=True)
class _Items(Dataset[tuple[Tensor | None, int, str]]):
    """One item an entry: (image or None, label, what is wrong with it). `scale` is the pixels that the short side is resized to."""

    entries: list[_Entry]
    labels: list[int]
    read: Callable[[_Entry], Image.Image | Tensor]
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


def _read_file(entry: _Entry) -> Image.Image:
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


def _read_row(entry: _Entry) -> Image.Image | Tensor:
    with safe_open(entry.file, "pt") as file:
        image: Tensor = file.get_slice("images")[entry.offset : entry.offset + 1][0]
    if image.dtype == torch.uint8:
        return Image.fromarray((image.permute(1, 2, 0) if image.shape[0] == 3 else image).contiguous().numpy())
    if not bool(torch.isfinite(image).all()):
        raise ValueError("NaN or infinity")
    return image


def _collate(items: list[tuple[Tensor | None, int, str]]) -> tuple[Tensor | None, Tensor, list[str]]:
    """(images or None where none is good, labels, faults): stacked where they are decoded, so that a worker hands over one tensor."""
    good = [(image, label) for image, label, _ in items if image is not None]
    images = torch.stack([image for image, _ in good]) if good else None
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), [fault for image, _, fault in items if image is None]
