"""`--dry-run`: the command tried on a few images, in a folder that is thrown away, to say what all of it takes.

    seconds = those of the trial + for each pass that went through all its images, those of its last batch for every batch more

What does not depend on the number of images (loading, fitting, solving, writing) is done in full, so a dry run takes a while itself: as
long as the command does on two batches. A first batch is slower than those that follow, so the last one counts. Memory is the most that
this process ever held: images come batch by batch, more of them need no more of it. Work that holds all its images at once is tried on
two numbers of them, and time goes on as a line through both; so do the bytes that each part's tensors hold, since on few images the
memory of the process shows what does not grow, and what the allocator keeps. Disk is what the trial wrote.
"""

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
    terminal: Terminal, work: "Callable[[Images, Path], list[float]]", fewer: "Images", more: "Images", num_images: int, started: float
) -> dict[str, Any]:
    """As `tried`, for work that holds all its images at once: time and memory grow on as they do from fewer images to more.

    Args:
        terminal: where it says that it goes on.
        work: goes through images and writes into the folder; gives the most bytes that each part of it takes, as many parts each time.
        fewer: images of the first trial.
        more: images of the second one.
        num_images: those of the whole command.
        started: when the command started, by `time.perf_counter`.
    """
    from vitq.bench.child import peak_memory, present_memory

    present, prepared = present_memory(), time.perf_counter() - started
    seconds, disk = [], 0
    taken: list[list[float]] = []
    for images in (fewer, more):
        found = trial(
            terminal,
            lambda folder, images=images: taken.append(work(images, folder)),
            counted(images.num_listed, "image"),
            time.perf_counter(),
        )
        seconds.append(found["seconds"])
        disk = found["disk_bytes"]

    def drawn_out(first: float, second: float) -> float:
        each = max(second - first, 0) / (more.num_listed - fewer.num_listed)
        return second + each * (num_images - more.num_listed)

    most = peak_memory()  # what does not grow is most where images are few
    memory = None if present is None or most is None else max(most, present + round(max(map(drawn_out, *taken))))
    return {"num_images": num_images, "seconds": prepared + drawn_out(*seconds), "memory_bytes": memory, "disk_bytes": disk}


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
