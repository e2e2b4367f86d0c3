"""Results that are kept as they come, so that a killed run goes on where it stopped and ends with the same bytes.

A journal is a file of JSON lines: a header that says what is measured, then one line a result, in the order in which a run asks for them.
A run asks for each result by its key. As long as the file's next line has that key, the line is the answer; at the first one that has
not (another header, other images, a line torn by the kill, the end) the file is cut there, and results are computed and appended from
then on. So a journal of something else is begun anew, and one of the same thing is never asked for twice. A file that is no
journal at all is refused, not overwritten.

Numbers are written so that reading gives the same float64 back, and lines are flushed one by one.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from vitq.errors import InputError
from vitq.whole import cannot_write, lock

FORMAT = "vitq-journal/1"

_MAGIC = f'{{"format": "{FORMAT}"'.encode()


class Journal:
    """A journal at a path, or, with None for the path, none: then everything is computed. Use it in a `with` statement."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        """Opens or begins the journal of what `header` (plain JSON values) describes.

        Raises:
            InputError: the file is no journal, cannot be read and written, or another run writes it.
        """
        self._path, self._file, self._accepted = path, None, 0
        self._replaying = path is not None
        if path is not None:
            self._file = _open(path)
            self.result({"format": FORMAT, **header}, list)

    def result(self, key: Mapping[str, Any], compute: Callable[[], Sequence[float]]) -> list[float]:
        """The numbers recorded under `key`, or those of `compute()`, which are then recorded."""
        if self._replaying and (recorded := self._next(key)) is not None:
            return recorded
        numbers = [float(number) for number in compute()]
        if self._file is not None:
            self._append(json.dumps({**key, "numbers": numbers}).encode() + b"\n")
        return numbers

    def __enter__(self) -> "Journal":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _next(self, key: Mapping[str, Any]) -> list[float] | None:
        """The next line's numbers if it is whole and has this key; else the file ends before it from now on."""
        assert self._file is not None
        line = self._file.readline()
        entry = _parsed(line) if line.endswith(b"\n") else {}
        numbers = entry.pop("numbers", None)
        if entry == dict(key) and isinstance(numbers, list) and all(isinstance(number, float) for number in numbers):
            self._accepted += len(line)
            return numbers
        self._replaying = False
        self._file.truncate(self._accepted)
        self._file.seek(self._accepted)
        return None

    def _append(self, line: bytes) -> None:
        assert self._file is not None and self._path is not None
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error, "run again, it goes on there") from None


def _open(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        file = path.open("r+b")
    except OSError as error:
        raise cannot_write(path, error, "choose another place for the journal") from None
    try:
        lock(file.fileno(), wait=False)
    except BlockingIOError:
        file.close()
        raise InputError(f"another run writes {path}; wait until it has ended, or give another --run-dir") from None
    beginning = file.read(len(_MAGIC))
    if not _MAGIC.startswith(beginning):  # a header may be torn too
        file.close()
        raise InputError(f"{path} is no {FORMAT} file, so nothing is written to it; move it away or choose another place for the journal")
    file.seek(0)
    return file


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
