"""What a source holds: the entries of a folder, a tar or an images.safetensors in a fixed order, and their labels; no picture is decoded.

Left out: streams, web datasets, extensions other than timm's (.png, .jpg, .jpeg), hidden files and folders.
"""

import stat
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.readers.reader_image_in_tar import extract_tarinfos
from timm.utils.misc import natural_key

from vitq.errors import InputError
from vitq.units import counted

FORMAT = "vitq-images/1"
"""The `format` in the metadata of an images.safetensors whose float32 images are preprocessed already."""


class Entry(NamedTuple):
    """One image: its name in the source, the folder that holds it, and where its bytes (or its row of the tensor) are."""

    name: str
    folder: str
    file: Path
    offset: int
    size: int | None

    @property
    def encoded(self) -> bytes:
        """The name in bytes, whatever the file system allows in it."""
        return self.name.encode("utf-8", "surrogateescape")

    def located(self) -> "Entry":
        """With its size in bytes: -1 for what is no regular file, which must not be opened (a pipe would wait for ever)."""
        if self.size is not None:
            return self
        try:
            found = self.file.stat()
        except OSError:
            return self._replace(size=-1)
        return self._replace(size=found.st_size if stat.S_ISREG(found.st_mode) else -1)


def folder_entries(root: Path) -> list[Entry]:
    """The images of a folder and of the folders in it, by name."""
    files = [Path(file) for file, _ in find_images_and_targets(str(root), sort=False)[0]]
    entries = [(file.relative_to(root), file) for file in files]
    return _sorted([Entry(name.as_posix(), name.parent.name, file, 0, None) for name, file in entries])


def tar_entries(path: Path) -> list[Entry]:
    """The images of a tar and of the tars in it, by name; raises InputError where it is damaged."""
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
        entries.append(Entry(name, folder, path, start + member.offset_data, member.size))
    return _sorted(entries)


def _refuse_cut(path: Path) -> None:
    """Raises tarfile.TarError where a member is to be larger than what is left of the file: timm would look for its end for days."""
    with tarfile.open(path, "r:") as outer:
        for member in outer:
            if member.isfile() and member.name.endswith(".tar"):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    inner.getmembers()


def _sorted(entries: list[Entry]) -> list[Entry]:
    """In the order of their names, without hidden files (`._0001.jpg`) and folders (`.ipynb_checkpoints`)."""
    return sorted(entry for entry in entries if not any(part.startswith(".") for part in entry.name.split("/")))


def row_entries(path: Path, data_config: dict[str, Any], class_names: tuple[str, ...]) -> tuple[list[Entry], list[int] | None]:
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
    rows = [Entry(f"row {row}", "", path, row, 0) for row in range(shape[0])]
    if labels is None or not rows:
        return rows, None
    if labels.dtype != torch.int64 or labels.shape != (len(rows),) or int(labels.min()) < 0:
        raise InputError(
            f"{path}: `labels` must be int64 ({len(rows)},), 0 or more; it is {labels.dtype} {tuple(labels.shape)}; correct it"
        )
    if class_names and int(labels.max()) >= len(class_names):
        raise InputError(
            f"{path} holds label {int(labels.max())}, but the model has {counted(len(class_names), 'class')}; give its own images"
        )
    return rows, labels.tolist()


def labels_of(folders: list[str], model_names: tuple[str, ...], source: str) -> tuple[list[int] | None, tuple[str, ...]]:
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
