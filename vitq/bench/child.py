"""The process that `footprint` starts: `child.py FILE THREADS SHAPE...` loads a file, runs it twice, and prints what that took as JSON.

Imports nothing of vitq, whose libraries would be counted with the file.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

INT8_ALLOWED = {"session.qdqisint8allowed": "1"}  # as in runtime.py: no other option is taken from a file


def main() -> None:
    """Prints one JSON line."""
    file, threads, *shape = sys.argv[1:]
    session, load_ms = load(file, int(threads), {})
    asked = json.loads(session.get_modelmeta().custom_metadata_map.get("vitq.session_options", "{}"))
    if needed := {name: value for name, value in INT8_ALLOWED.items() if asked.get(name) == value}:
        del session
        session, load_ms = load(file, int(threads), needed)
    images = np.zeros([int(size) for size in shape], np.float32)
    for _ in range(2):
        session.run(None, {session.get_inputs()[0].name: images})
    print(json.dumps({"load_ms": load_ms, "peak_memory_bytes": peak_memory()}))


def load(file: str, threads: int, needed: dict[str, str]) -> tuple[onnxruntime.InferenceSession, float]:
    """A session with the options that a file needs, and the milliseconds that it took to make."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for key, value in {"session.intra_op.allow_spinning": "0", **needed}.items():
        options.add_session_config_entry(key, value)
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session, 1000 * (time.perf_counter() - started)


def peak_memory() -> int | None:
    """The most bytes that this process ever held in memory.

    Linux: VmHWM, which starts anew with the program; getrusage's maximum would be that of the process that started this one where that
    is larger.
    """
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _of_status("VmHWM:")


def present_memory() -> int | None:
    """The bytes that this process holds in memory now; where only the most is known, that."""
    return _of_status("VmRSS:") or peak_memory()


def _of_status(name: str) -> int | None:
    """Bytes of this process as Linux has them under a name."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main()
