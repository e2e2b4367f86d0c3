"""Runs commands in children that are killed: everything is imported once, then each command is a fork, alive in milliseconds.

A request is a line of JSON on stdin: `arguments`, `folder`, and when to kill, either `events` (at the so many-th write, rename, removal or
the like below the folder) or `seconds`; null kills never. The answer is a line of JSON: the exit `code` (-9: killed), the `events` that
there were, the `seconds` it took, and what it said on stderr, `err`.
With `small_demo`, `vitq demo` makes one plan from 16 images, few timings and a short staircase.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import vitq.accuracy
import vitq.allocation
import vitq.bench
import vitq.calibration
import vitq.cli.demo
import vitq.finetune
import vitq.images
import vitq.importance
import vitq.onnx_file
import vitq.onnx_file.card
import vitq.report
import vitq.synthesize
import vitq.trials
from vitq.cli.app import main

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree")


def child(request: dict, counted: str) -> None:
    """Never returns."""
    os.chdir(request["folder"])
    events = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal events
        if event not in CHANGES or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(request["folder"]):  # noqa: PTH100 (resolves no links)
            return
        events += 1
        if events == request.get("events"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    code = 0
    try:
        main(request["arguments"])
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    Path(counted).write_text(str(events))
    os._exit(code)


def small_demo() -> None:
    opened = vitq.images.open_images

    def few(source, data_config, *rest, class_names=(), **_):
        names = rest[4] if len(rest) > 4 else class_names
        return opened(source, data_config, 16, batch_size=8, class_names=names)

    staircase, latencies = vitq.allocation.pareto, vitq.bench.latencies
    vitq.images.open_images = few
    vitq.allocation.pareto = lambda profile: staircase(profile, vitq.allocation.Wishes(bits=[4, 8]))
    vitq.bench.latencies = lambda files, images: latencies(files, images, rounds=3, warmup=1)
    vitq.cli.demo.PLANS = {vitq.cli.demo.MIXED: {"budgets": ["3.0"]}}


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as place:
            said, counted = Path(place) / "err", Path(place) / "events"
            started = time.monotonic()
            process = os.fork()
            if process == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
                if request.get("small_demo"):
                    small_demo()
                child(request, str(counted))
            if request.get("seconds") is not None:
                time.sleep(request["seconds"])
                os.kill(process, signal.SIGKILL)  # a child that has ended is a zombie yet, whom this does nothing to
            _, status = os.waitpid(process, 0)
            answer = {
                "code": os.waitstatus_to_exitcode(status),
                "events": int(counted.read_text()) if counted.exists() else None,
                "seconds": time.monotonic() - started,
                "err": said.read_text(),
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
