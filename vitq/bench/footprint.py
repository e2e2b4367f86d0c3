"""How long a file takes to load and how much memory it needs: measured in a fresh process, which holds nothing else.

The process is `child.py`: Python, numpy, onnxruntime and one session. Its peak holds the packed weights as they unfold while the session
is made, and two runs.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitq.errors import InputError

CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class Footprint:
    """Milliseconds to make a session, and the most bytes that its process ever held; None where the system does not say."""

    load_ms: float
    peak_memory_bytes: int | None


def footprint(file: Path, shape: Sequence[int], threads: int) -> Footprint:
    """Loads a file in a process of its own and runs it on images of a shape.

    Raises:
        InputError: the process failed, for lack of memory for instance.
    """
    # -P: this folder is no place for the child to import from.
    command = [sys.executable, "-P", str(CHILD), str(file), str(threads), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"it ended with {done.returncode}"
        raise InputError(f"{file} cannot be run in a process of its own: {reason}; give a smaller --batch, or free some memory")
    return Footprint(**json.loads(done.stdout))
