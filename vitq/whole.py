"""Files that appear whole or not at all, locks that end with whoever holds them, and what a system refuses in words.

A file is made under another name beside its place, and renamed when it is whole. A run that is killed leaves the unfinished one behind,
`.NAME.RANDOM.part`. Whoever makes one holds a lock on it, which the system drops with the process, however that ends: so the next run
that writes to the same place knows what nobody makes any more, and removes it.

Left out: systems and file systems without flock. There nothing is locked, and what a killed run left stays.
"""

import errno
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vitq.commands import DEFAULT_FOLDER, usual_name, writing
from vitq.errors import InputError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PART = ".part"
_REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "allow larger files there",
    errno.EACCES: "change who may read and write there",
    errno.EPERM: "change who may read and write there",
    errno.EROFS: "mount it to be written to",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOTDIR: "give a path through folders only",
    errno.EEXIST: "give a path through folders only",
    errno.ELOOP: "give a path without links that lead in a circle",
    errno.EIO: "look after the disk",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Has `write` fill a temporary file beside `path`, then renames it, so that no half-written file is ever seen.

    Raises:
        UsageError: the path is a folder, a device or a pipe.
        InputError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        refuse_existing(path, force=True)
        with unfinished(path) as temporary:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def refuse_existing(path: str | Path, force: bool) -> None:
    """Raises UsageError where `path` exists and `force` is not set, and where it is no file that could be replaced."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give -o a file to write")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or a pipe, which is not replaced; give -o a file to write")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already; give --force to replace it or -o to write elsewhere")


def refuse_missing(path: str | Path, made_by: str) -> None:
    """Raises InputError where there is no file `path`, which the command `made_by` writes."""
    path = Path(path)
    if path.is_dir():
        inside = path / usual_name(made_by)
        found = f"{inside}, or --run-dir {shlex.quote(str(path))}" if inside.is_file() else f"the file that `{made_by}` writes"
        raise InputError(f"{path} is a folder; give {found}")
    if not path.is_file():
        elsewhere = ", and --run-dir names another run folder" if path.parent == DEFAULT_FOLDER else ""
        raise InputError(f"{path} does not exist; `{writing(made_by, path)}` writes it{elsewhere}")


def cannot_write(path: str | Path, error: Exception, otherwise: str = "choose another place with -o or --run-dir") -> InputError:
    """The fault of a file that cannot be written: what the system refused, and what to do about it."""
    reason, remedy = refusal(error) or ((getattr(error, "strerror", None) or str(error)), "")
    return InputError(f"cannot write {path}: {reason}; {remedy}{', or ' if remedy else ''}{otherwise}")


def refusal(error: Exception) -> tuple[str, str] | None:
    """What a system refused, by the error's number or its text, and what to do about it; None where it may be a fault of ours."""
    text = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' own errors
    number = error.errno if isinstance(error, OSError) else int(text[1]) if text else None
    if number not in _REMEDIES:
        return None
    return "there is a file where a folder is needed" if number in (errno.EEXIST, errno.ENOTDIR) else os.strerror(number), _REMEDIES[number]


@contextmanager
def unfinished(path: Path, folder: bool = False) -> Iterator[Path]:
    """A new file, or folder, beside `path`, that is gone afterwards unless it was renamed; what killed runs left there is removed.

    Raises:
        OSError: the place cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f".{path.name.encode('utf-8', 'surrogateescape')[:80].decode('utf-8', 'ignore')}."
    for left in path.parent.glob(f"{escape(start)}*{PART}"):
        with suppress(OSError), locked(left, wait=False) as held:
            if held:
                _remove(left)
    made, handle = _made(path.parent, start, folder)
    try:
        yield made
    finally:
        _remove(made)
        os.close(handle)


@contextmanager
def locked(place: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of a file or folder; gives and raises what `lock` does, and OSError where there is none to open."""
    handle = os.open(place, os.O_RDONLY)
    try:
        yield lock(handle, wait)
    finally:
        os.close(handle)


def lock(handle: int, wait: bool) -> bool:
    """Takes the lock of an open file or folder, until it is closed; False where the system or the file system has none.

    Raises:
        BlockingIOError: another run holds it, and `wait` is not set.
    """
    try:
        if fcntl is None:
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _made(parent: Path, start: str, folder: bool) -> tuple[Path, int]:
    """A new file or folder and the handle that holds its lock."""
    while True:
        if folder:
            name = tempfile.mkdtemp(PART, start, parent)
        else:
            handle, name = tempfile.mkstemp(PART, start, parent)
            os.close(handle)
        with suppress(FileNotFoundError):
            handle = os.open(name, os.O_RDONLY)
            lock(handle, wait=True)
            if Path(name).exists():
                return Path(name), handle
            os.close(handle)  # another run took it for left, in the moment before it was locked


def _remove(made: Path) -> None:
    with suppress(OSError):
        if made.is_dir():
            shutil.rmtree(made)
        else:
            made.unlink()
