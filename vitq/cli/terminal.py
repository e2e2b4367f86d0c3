"""What a command says and where: the result to stdout, everything else to stderr, progress only on a terminal.

Colours, widths and NO_COLOR are rich's business; in a pipe there is no colour and a table is 80 columns wide.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitq.units import counted

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table

    from vitq.images import Images


@dataclass(frozen=True)
class Terminal:
    """How much a command says, as its options -q, -v and --json have it."""

    quiet: bool
    verbose: bool
    as_json: bool

    def note(self, text: str) -> None:
        """A remark for people."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def detail(self, text: str) -> None:
        """A remark for those who asked for more."""
        if self.verbose:
            self.note(text)

    def preprocessing(self, data_config: dict[str, Any], known: dict[str, Any] | None = None) -> None:
        """How images are prepared; where that is as `known`, said before, a detail."""
        from vitq.preparation import describe

        (self.detail if data_config == known else self.note)(f"preprocessing: {describe(data_config)}")

    def resampled(self, tables: Sequence[str]) -> None:
        """That a model takes images of another size than its checkpoint: the tables of positions that timm resampled for them."""
        if tables:
            more = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
            self.note(f"resampled to the size of the images: {tables[0]}{more}")

    def result(self, document: dict[str, Any], *parts: "str | Table") -> None:
        """What the command found: the document with --json, else the parts, lines or tables."""
        if self.as_json:
            print(json_text(document), end="", flush=True)  # so that a full disk is said here, and not as the interpreter ends
            return
        for part in parts:
            if isinstance(part, str):
                print(part)
            else:
                from rich.console import Console

                Console().print(part)
        sys.stdout.flush()

    def next(self, command: str) -> None:
        """The command that comes next, for people."""
        if not self.as_json:
            self.note(f"next: {command}")

    @contextmanager
    def watching(self, images: "Images", what: str) -> "Iterator[Callable[[float, float, str], None]]":
        """Shows every pass over the images while inside, and in the end names those that could not be read; off a terminal one line.

        Gives a function that shows what comes between the passes: (work done, all of it, its name), with the time that is left.
        """
        try:
            with self._bar(what, images.num_listed, counted(images.num_listed, "image")) as (progress, bar):
                images.progress = lambda done, _: progress.update(bar, description=what, completed=done)
                yield _work(progress, bar, what, images.num_listed)
        finally:
            images.progress = None
            if images.skipped:
                print(f"skipped {len(images.skipped)} of {counted(images.num_listed, 'image')} that cannot be read:", file=sys.stderr)
                print("\n".join(f"  {name}" for name in images.skipped), file=sys.stderr)

    @contextmanager
    def working(self, what: str, on: str) -> "Iterator[Callable[[float, float, str], None]]":
        """As `watching`, for work that is no pass over images; `on` says for people what it is about."""
        with self._bar(what, 100, on) as (progress, bar):
            yield _work(progress, bar, what, 100)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows that something goes on whose end is not known, and for how long; on a terminal only."""
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True, disable=self.quiet or not console.is_terminal) as progress:
            progress.add_task(what, total=None)
            yield

    @contextmanager
    def keeping(self, path: Path | None) -> Iterator[None]:
        """Around work that leaves what is done at `path` when it is interrupted, and goes on from there; None: it leaves nothing."""
        try:
            yield
        except KeyboardInterrupt as interruption:
            if path is not None and path.exists():
                interruption.add_note(f"what is done is kept in {path}; the same command again goes on there")
            raise

    @contextmanager
    def _bar(self, what: str, total: int, on: str) -> "Iterator[tuple[Progress, TaskID]]":
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            self.note(f"{what}: {on} ...")
        columns = (
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # The speed is that of an hour: a step may take minutes from one report to the next.
        with Progress(
            *columns, console=console, transient=True, speed_estimate_period=3600, disable=self.quiet or not console.is_terminal
        ) as progress:
            yield progress, progress.add_task(what, total=total)


def _work(progress: "Progress", bar: "TaskID", what: str, length: int) -> Callable[[float, float, str], None]:
    """What shows (work done, all of it, its name) in a bar of a length."""
    return lambda done, whole, name: progress.update(bar, description=f"{what} {name}", completed=length * done / whole)


def json_text(document: dict[str, Any]) -> str:
    """The document as JSON; what is not finite, which JSON cannot say, becomes null."""
    return json.dumps(_finite(document), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
