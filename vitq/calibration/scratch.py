"""Files for what grows with the number of images, and for the blocks that are done, in one scratch folder.

Memory holds a batch at a time: rows are mapped for the moment of a read or write only, so that a process never has more of a file in
its memory than it asked for. A folder belongs to one calibration, named by a digest; one of another is begun anew. What is finished is
kept, block by block, each file whole or not there, so that a killed run goes on behind its last whole block.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitq.errors import InputError
from vitq.whole import cannot_write, lock, locked, write_whole

_OWNER = "calibration.txt"


class Rows:
    """A file of equal rows: a tensor (count, ...) of which some rows at a time are read and written, on the CPU."""

    def __init__(self, path: Path, count: int) -> None:
        """Begins the file with the first write, which sets the rows' shape and type."""
        self.path, self.count = path, count
        self._shape: tuple[int, ...] = ()
        self._dtype: np.dtype | None = None

    def write(self, first: int, values: Tensor) -> None:
        """Puts values, (some, ...), at the rows from `first` on."""
        rows = np.ascontiguousarray(values.detach().cpu().numpy())
        mode = "r+b"
        if self._dtype is None:
            self._shape, self._dtype, mode = (self.count, *rows.shape[1:]), rows.dtype, "w+b"
        size = math.prod(self._shape[1:]) * self._dtype.itemsize
        try:  # written and not mapped: on a full disk, writing to a map kills the process
            with self.path.open(mode) as file:
                file.truncate(self.count * size)
                file.seek(first * size)
                file.write(rows.data)
        except OSError as error:
            raise cannot_write(self.path, error, "run again, it goes on there") from None

    def read(self, rows: Tensor) -> Tensor:
        """The rows of the given numbers, a tensor of its own."""
        assert self._dtype is not None, "nothing was written yet"
        return torch.from_numpy(np.array(np.memmap(self.path, self._dtype, "r", shape=self._shape)[rows.numpy()]))

    def remove(self) -> None:
        """Deletes the file."""
        self.path.unlink(missing_ok=True)


class Scratch:
    """A scratch folder of the calibration with the given digest, for one run at a time: use it in a `with` statement."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Makes the folder, or goes on in it.

        Raises:
            InputError: there is something else in its place, another run uses it, or it cannot be written.
        """
        self.folder = folder
        owner = folder / _OWNER
        try:
            if folder.exists() and any(folder.iterdir()) and not owner.is_file():
                raise InputError(f"{folder} is no scratch folder of vitq, so nothing is written to it; move it away or choose another")
            folder.mkdir(parents=True, exist_ok=True)
            self._owner = owner.open("a+", encoding="utf-8")
            lock(self._owner.fileno(), wait=False)
            self._owner.seek(0)
            if self._owner.read() != digest:
                self._owner.truncate(0)
                _empty(folder)
                self._owner.write(digest)
                self._owner.flush()
        except BlockingIOError:
            raise InputError(f"another run calibrates in {folder}; wait until it has ended, or give another --run-dir") from None
        except OSError as error:
            raise cannot_write(folder, error, "choose another scratch folder") from None

    def __enter__(self) -> "Scratch":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Lets other runs use the folder."""
        self._owner.close()

    def rows(self, name: str, count: int) -> Rows:
        """A new file of rows."""
        return Rows(self.folder / f"{name}.rows", count)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a block's result."""
        own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        write_whole(self._result(name), lambda temporary: save_file(own, temporary))

    def kept(self, name: str) -> dict[str, Tensor] | None:
        """The result that was kept under a name; None where there is none."""
        path = self._result(name)
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}; remove {self.folder} and run again") from None

    def remove(self) -> None:
        """Deletes the folder and all that is in it."""
        self._owner.close()
        discard(self.folder)

    def _result(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def discard(folder: Path) -> None:
    """Deletes a scratch folder that no run uses, what marks it as one last: a run that is killed here is no obstacle to the next."""
    with suppress(BlockingIOError, FileNotFoundError), locked(folder / _OWNER, wait=False):
        _empty(folder)
        (folder / _OWNER).unlink()
        folder.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != _OWNER:
            path.unlink()
