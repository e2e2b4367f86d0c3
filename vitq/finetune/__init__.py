"""Fine-tuning: all quantized layers learn at once, from labelled and augmented images, to say what the float network says.

    checkpoint ─ variables ─► (distillation, its gradients through every rounding, AdamW) x steps ─► checkpoint

The variables are those that recipe `reconstruct` learns block by block (calibration/variables.py), here of every layer of the graph:
weights in steps, scales, zero points, biases, LayerNorms. The forward pass has the values of the exported file, so what is trained is
what is exported. The captured graph stays in eval mode: no dropout, no stochastic depth.

    training      how: recipe, length, rates, loss, augmentation
    distillation  the loss
    learner       one step after the other
    schedule      rates along the run
    processes     several of them, one mean of gradients
    state         what a killed run goes on from

Recipes: `lsq` learns weight scales by gradients (Esser et al., Learned Step Size Quantization, ICLR 2020); `ofq` lets them follow the
weights' statistics and ends with confidence-guided annealing (Liu et al., Oscillation-free Quantization, ICML 2023): in the last tenth
only those weights move that are close to where rounding changes. Differs from the papers: a short run from a calibrated checkpoint, not
hundreds of epochs; OFQ's queries and keys are not reparameterised, which would cost products in the file.

Left out: parameters that belong to no layer and no LayerNorm (class token, position embedding, LayerScale) stay as they are.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vitq.augmented import Augmentation, TrainingImages, untouched
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError
from vitq.finetune.distillation import Distillation
from vitq.finetune.learner import Learner
from vitq.finetune.processes import Processes, joined
from vitq.finetune.schedule import Schedule, steps_within
from vitq.finetune.state import keep, kept
from vitq.finetune.training import RECIPES, Training
from vitq.images import Images
from vitq.models import LoadedModel

__all__ = ["RECIPES", "Augmentation", "Distillation", "Finetuned", "Processes", "Training", "finetune", "joined"]

Progress = Callable[[float, float, str], None]
"""Called with the steps that are done, all of them, and where the loss is, for people."""

_HELD_OUT, _MOST_HELD_OUT = 16, 512  # of so many images one is held out, and so many at most
_MOST_JUDGED = 2048  # of images that are given to judge on
_TRIED = 4  # steps that are timed before the first one is taken
_SAVES = 8  # in the minutes that are given, at least: there, too, steps are fitted to the time that is left
_ANNEALED = 0.1  # recipe ofq: the last part of the run


@dataclass(frozen=True)
class Finetuned:
    """What came of it.

    `checkpoint` is the one that was started from where the loss has not fallen on the images that judge; `before` and `after` are those
    losses, nats an image, on `judges` images; `steps` were taken, in `epochs` passes over those trained on. `fair` says whether the images
    could judge: with labels, held-out images that the float model may know by heart cannot, and what was trained is `checkpoint` in any
    case.
    """

    checkpoint: Checkpoint
    before: float
    after: float
    judges: int
    steps: int
    epochs: float
    fair: bool


def finetune(
    checkpoint: Checkpoint,
    model: LoadedModel,
    images: Images,
    training: Training,
    state: Path,
    processes: Processes | None = None,
    spent: float = 0.0,
    progress: Progress | None = None,
    validation: Images | None = None,
) -> Finetuned:
    """Trains a calibrated checkpoint.

    Args:
        checkpoint: where to start, on the device to compute on.
        model: the float model, which teaches.
        images: to train on; one in sixteen is held out to judge on, up to 512, where there is no `validation`.
        training: how.
        state: the file that a killed run goes on from; it stays, for whoever has saved the result to remove.
        processes: those that share the work.
        spent: seconds of `training.minutes` that are gone already.
        progress: is told how far it is.
        validation: to judge on instead, up to 2,048 of them evenly spread.

    Raises:
        UsageError: options that cannot be trained with, or the state of another run.
        InputError: no labels where they are wanted, too few images or ones that cannot be read, a loss that grows beyond all numbers.
    """
    begun, processes = time.perf_counter() - spent, processes or Processes()
    training.check()
    judging = images if validation is None else validation
    for given in (images, judging) if training.distillation.hard else ():
        if not (model.num_classes and given.labelled):
            why = f"{given.source} has no labels" if model.num_classes else f"{model.source} is no classifier"
            raise InputError(f"{why}; give --hard 0 to learn from the float model alone, or images in a folder for each of its classes")
    judges, rows = _split(images) if validation is None else (_judges(validation), list(range(images.num_listed)))
    share = (processes.rank, processes.count)
    source = TrainingImages(
        images, rows, training.augmentation, training.batch_size, training.seed, model.num_classes, training.workers, share
    )
    whole = max(1, round(training.epochs * source.steps_per_epoch))
    learner = Learner(checkpoint, model, training, processes)

    def judged() -> float:
        """The loss on the images that judge, as the leading process finds it."""
        return processes.agreed(learner.mean_loss(untouched(judging, judges, training.batch_size)) if processes.leads else 0.0)

    def fitted(schedule: Schedule, each: float) -> Schedule:
        """With the time that is spent, and no more steps left than there is time for."""
        schedule = replace(schedule, seconds=processes.agreed(earlier + time.perf_counter() - begun))
        if training.minutes is None:
            return schedule
        seconds = 60 * training.minutes - schedule.seconds
        return replace(schedule, left=steps_within(seconds, processes.agreed(each), whole - schedule.taken))

    name, earlier = _digest(checkpoint, model, images, judging, training, processes), 0.0
    ended = checkpoint.made_from.get("finetuning")
    found = kept(state, name, ended.get("run") if isinstance(ended, Mapping) else None)
    if found is None:
        at = time.perf_counter()
        before, schedule = judged(), Schedule(whole)
        begun -= time.perf_counter() - at  # once more comes in the end
        if training.minutes is not None:
            schedule = fitted(schedule, learner.seconds_a_step(source.batches(), _TRIED))
    else:
        schedule, before, tensors = found
        learner.put(tensors)
        earlier = schedule.seconds

    pause = 60 * min(training.save_minutes, (training.minutes or math.inf) / _SAVES)
    saved, steps, mean = time.perf_counter(), 0, math.nan  # since when, and how many, after the last save
    for batch in source.batches(schedule.taken):
        annealing = training.recipe == "ofq" and schedule.progress >= 1 - _ANNEALED
        loss = learner.step(batch, schedule.factor(training.warmup), annealing)
        schedule, steps = schedule.stepped(), steps + 1
        mean = loss if math.isnan(mean) else mean + _SHOWN * (loss - mean)
        if progress:
            progress(schedule.taken, schedule.taken + schedule.left, f"loss {mean:.3f}")
        if not schedule.left:
            break
        if processes.agreed(time.perf_counter() - saved) >= pause:
            schedule = fitted(schedule, (time.perf_counter() - saved) / steps)
            if processes.leads:
                keep(state, name, schedule, before, learner.tensors())
            saved, steps = time.perf_counter(), 0

    learner.finish()
    after, epochs = judged(), schedule.taken / source.steps_per_epoch
    # A float model that was trained on these images knows their labels by heart: every step away from it is a loss there, and no judge.
    fair = validation is not None or not training.distillation.hard
    if fair and not after < before:
        return Finetuned(checkpoint, before, after, len(judges), schedule.taken, epochs, fair)
    trained_on = {"source": images.source, "digest": images.digest, "num_images": images.num_listed}
    how = {key: value for key, value in asdict(training).items() if key not in _WITHOUT_EFFECT}
    finetuning = how | {"images": trained_on, "steps": schedule.taken, "processes": processes.count, "run": name}
    made = learner.checkpoint()
    made = replace(made, floats=None, errors={}, made_from={**checkpoint.made_from, "finetuning": finetuning})
    return Finetuned(made, before, after, len(judges), schedule.taken, epochs, fair)


_WITHOUT_EFFECT = ("save_minutes", "workers")
_SHOWN = 0.05  # of the mean loss that is shown, the part of the last step


def _split(images: Images) -> tuple[list[int], list[int]]:
    """The numbers of the images that are held out, evenly spread, since they may be in the order of classes, and of those trained on."""
    every = max(_HELD_OUT, math.ceil(images.num_listed / _MOST_HELD_OUT))
    held = list(range(every - 1, images.num_listed, every))
    if not held:
        raise InputError(f"{images.num_listed} images are too few to train on; give --images with at least {_HELD_OUT}")
    out = set(held)
    return held, [row for row in range(images.num_listed) if row not in out]


def _judges(validation: Images) -> list[int]:
    """The numbers of the images that judge, of those given for it, evenly spread."""
    return list(range(0, validation.num_listed, math.ceil(validation.num_listed / _MOST_JUDGED)))


def _digest(checkpoint: Checkpoint, model: LoadedModel, images: Images, judging: Images, training: Training, processes: Processes) -> str:
    """What a run depends on."""
    how = {key: value for key, value in asdict(training).items() if key not in _WITHOUT_EFFECT}
    seen = images.digest, judging.digest
    parts = (how, processes.count, model.digest, seen, checkpoint.plan.layers, checkpoint.activations, torch.__version__)
    hashed = hashlib.sha256(repr(parts).encode())
    tensors = checkpoint.graph.module.state_dict() | {name: weight.codes for name, weight in checkpoint.weights.items()}
    for value in tensors.values():
        hashed.update(value.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()
