"""A finished model on disk: one file, or, where protobuf's 2 GB would not hold it, a file of nodes and one of tensors beside it.

Files are made in a folder of their own beside the place where they are to appear, run from there, and renamed into place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from vitq.whole import cannot_write, unfinished

LARGEST = 2**31 - 2**24
"""Bytes of tensors that a file of one part holds; protobuf's limit is 2^31 for all of it."""


def data_file(path: Path) -> Path:
    """Where the tensors of a large model lie: `model.onnx.data` beside `model.onnx`."""
    return path.with_name(path.name + ".data")


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is gone afterwards.

    Raises:
        InputError: the place cannot be written to, or the disk is full.
    """
    try:
        with unfinished(path, folder=True) as folder:
            yield folder
    except OSError as error:
        raise cannot_write(path, error) from None


def store(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model whole; tensors that are stored apart are no longer in `model`, which refers to them."""
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= LARGEST:
        path.write_bytes(model.SerializeToString())
    else:
        onnx.save_model(model, path, save_as_external_data=True, location=data_file(path).name, size_threshold=1024)


def load_file(path: Path) -> onnx.ModelProto:
    """The model that `store` was given, its tensors inside again; raises what protobuf, onnx and the system raise."""
    model = onnx.ModelProto.FromString(path.read_bytes())
    apart = [tensor for tensor in model.graph.initializer if tensor.external_data]
    if apart:
        onnx.load_external_data_for_model(model, str(path.parent))
    for tensor in apart:
        tensor.ClearField("data_location")
    return model


def runnable(model: onnx.ModelProto, folder: Path | None) -> bytes | Path:
    """A model in the form that onnxruntime loads: its bytes, or, where its tensors lie apart in `folder`, a file there."""
    if folder is None or not any(tensor.external_data for tensor in model.graph.initializer):
        return model.SerializeToString()
    path = folder / "runnable.onnx"
    store(model, path)
    return path


def place(stored: Path, path: Path) -> None:
    """Renames what `store` wrote to where it is to appear, and removes the tensors of a large file that was there before."""
    if data_file(stored).exists():
        data_file(stored).replace(data_file(path))
    else:
        data_file(path).unlink(missing_ok=True)
    stored.replace(path)
