"""The state of a run that is under way, in one .safetensors beside what it will write: a killed run goes on from it to the same bytes.

Tensors are the variables, the optimizer's moments and the moving averages; the header's metadata hold the schedule and the name of the
run. What is random needs no state: the pictures of a step are a function of the seed and the step (vitq/augmented.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitq.errors import InputError, UsageError
from vitq.finetune.schedule import Schedule
from vitq.whole import write_whole

FORMAT = "vitq-finetuning/1"


def keep(path: Path, name: str, schedule: Schedule, before: float, tensors: Mapping[str, Tensor]) -> None:
    """Writes the state, whole or not at all.

    Args:
        path: of the file.
        name: a digest of what the run depends on.
        schedule: where the run is.
        before: the held-out loss that it started from.
        tensors: by name.
    """
    own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    metadata = {"format": FORMAT, "run": name, "schedule": json.dumps(asdict(schedule)), "before": json.dumps(before)}
    write_whole(path, lambda temporary: save_file(own, temporary, metadata=metadata))


def kept(path: Path, name: str, ended: str | None = None) -> tuple[Schedule, float, dict[str, Tensor]] | None:
    """The schedule, the held-out loss and the tensors that were kept; None where there is no file, or one of the run `ended`.

    A run that is killed between its result and the removal of its state leaves a state that nobody goes on from.

    Raises:
        InputError: the file is damaged, or no state of a run.
        UsageError: it is the state of another run.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is no state of a fine-tuning, so nothing is written to it; move it away")
        schedule, before = Schedule(**json.loads(metadata["schedule"])), float(json.loads(metadata["before"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}; give --no-resume to begin anew") from None
    if ended is not None and metadata.get("run") == ended:
        return None
    if metadata.get("run") != name:
        raise UsageError(
            f"{path} is of a fine-tuning with other options, images or another start; give those to go on, or --no-resume to begin anew"
        )
    return schedule, before, tensors
