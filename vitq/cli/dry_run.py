"""`--dry-run`: the command tried on a few images, in a folder that is thrown away, to say what all of it takes.

    seconds = those of the trial + for each pass that went through all its images, those of its last batch for every batch more

What does not depend on the number of images (loading, fitting, solving, writing) is done in full, so a dry run takes a while itself: as
long as the command does on two batches. A first batch is slower than those that follow, so the last one counts. Memory is the most that
this process ever held: images come batch by batch, more of them need no more of it. Work that holds all its images at once is tried on
two numbers of them, and time and memory go on as a line through both. Disk is what the trial wrote.
"""

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitq.cli.terminal import Terminal
from vitq.units import counted, in_minutes, in_units

if TYPE_CHECKING:
    from vitq.images import Images


def trial_size(batch_size: int, least: int = 1) -> int:
    """The images of a trial: two batches, or `least`."""
    return max(2 * batch_size, least)


def tried(terminal: Terminal, work: Callable[[Path], Any], images: "Images", num_images: int, started: float) -> dict[str, Any]:
    """Carries out `work`, given a folder to write to, on `images`; what it would take with `num_images` of them.

    Args:
        terminal: where it says that it goes on.
        work: goes through `images` and writes into the folder.
        images: those of the trial.
        num_images: those of the whole command.
        started: when the command started, by `time.perf_counter`.

    Returns:
        `num_images`, `seconds` and `disk_bytes`, and `memory_bytes`, None where the system does not say.
    """
    reports: list[tuple[float, int]] = []
    images.progress = lambda done, _: reports.append((time.perf_counter(), done))
    found = trial(terminal, work, counted(images.num_listed, "image"), started)
    images.progress = None
    more = (num_images - images.num_listed) * _seconds_an_image(reports, images.num_listed)
    return {"num_images": num_images} | found | {"seconds": found["seconds"] + more}


def tried_twice(
    terminal: Terminal, work: "Callable[[Images, Path], Any]", fewer: "Images", more: "Images", num_images: int, started: float
) -> dict[str, Any]:
    """As `tried`, for work that holds all its images at once: time and memory grow on as they do from fewer images to more."""
    from vitq.bench.child import peak_memory

    before, prepared = peak_memory(), time.perf_counter() - started
    first, second = (_fresh_trial(terminal, work, images) for images in (fewer, more))
    found = {"num_images": num_images} | second
    for name in ("seconds", "memory_bytes"):
        if second[name] is not None:
            each = max(second[name] - first[name], 0) / (more.num_listed - fewer.num_listed)
            found[name] = second[name] + each * (num_images - more.num_listed)
    memory = None if before is None else max(before, round(found["memory_bytes"]))
    return found | {"seconds": prepared + found["seconds"], "memory_bytes": memory}


def _fresh_trial(terminal: Terminal, work: "Callable[[Images, Path], Any]", images: "Images") -> dict[str, Any]:
    """A trial whose memory is its own most, where the system forgets earlier ones (Linux)."""
    gc.collect()  # graphs refer to themselves, and would keep their tensors
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return trial(terminal, lambda folder: work(images, folder), counted(images.num_listed, "image"), time.perf_counter())


def trial(terminal: Terminal, work: Callable[[Path], Any], on: str, started: float) -> dict[str, Any]:
    """`seconds`, `memory_bytes` and `disk_bytes` of the trial alone; arguments as for `tried`, `on` says for people what it is tried on."""
    from vitq.bench.child import peak_memory

    with terminal.waiting(f"try it on {on}"), tempfile.TemporaryDirectory(prefix="vitq-") as folder:
        work(Path(folder))
        disk = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {"seconds": time.perf_counter() - started, "memory_bytes": peak_memory(), "disk_bytes": disk}


def _seconds_an_image(reports: list[tuple[float, int]], whole: int) -> float:
    """What one image more takes in all passes, from (when, images done) after each batch; a pass that stopped early would again."""
    last = [(at - before, done - earlier) for (before, earlier), (at, done) in pairwise(reports) if done == whole > earlier]
    return sum(seconds / count for seconds, count in last)


def say_estimate(terminal: Terminal, what: str, found: dict[str, Any], where: Path | str) -> None:
    """The estimate for people, or as JSON."""
    memory = "" if found["memory_bytes"] is None else f"{in_units(found['memory_bytes'], 'B')} of memory and "
    line = f"{what} would take about {in_minutes(found['seconds'])} on {counted(found['num_images'], 'image')}"
    terminal.result(found, line, f"{memory}{in_units(found['disk_bytes'], 'B')} of disk, {where}")
