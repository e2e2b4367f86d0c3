"""Images made from a model alone, to calibrate it where there are none of its own: patch similarity aware synthesis.

Z. Li, L. Ma, M. Chen, J. Xiao, Q. Gu: Patch Similarity Aware Data-Free Quantization for Vision Transformers (PSAQ-ViT), ECCV 2022,
arXiv:2203.02250. The images descend, batch by batch, from noise to what the objective asks; gradients run through the one captured graph.

    patches    where in the graph patches can be compared
    entropy    how various their similarities are
    objective  the loss of an image
    descent    a batch of images from noise
    pictures   bytes, the file, the sheet

The steps are as many as fit the time that is given, measured beforehand; the same seed and number of steps make the same images. A batch
that is finished is kept, and a killed run goes on behind it, with the steps that it had fitted.

Differs from the paper: every class is prescribed equally often, in a random order, where the paper draws classes. The second
half of the paper, quantization by min-max ranges, is replaced by the recipes of `vitq calibrate`.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitq.calibration.scratch import Scratch
from vitq.errors import InputError, UsageError
from vitq.graph import capture
from vitq.models import LoadedModel
from vitq.synthesize.descent import descend
from vitq.synthesize.objective import Objective, objective_of
from vitq.synthesize.pictures import framed, pixels, preprocessed, save, sheet
from vitq.units import counted, in_minutes

__all__ = ["STEPS", "Synthesis", "framed", "refuse_too_short", "save", "sheet", "synthesize"]

STEPS = 1000
"""The paper's, of both stages together."""

_TRIED = 5  # steps that are timed, the first of them to warm up


@dataclass(frozen=True)
class Synthesis:
    """What was made: pictures, uint8 (N, 3, H, W), their prescribed classes, int64 (N,) or None, and the steps of each batch.

    `entropy` is the mean of the images' and their layers' entropies, in nats, `noise_entropy` that of as much noise as a batch, and
    `agreement` the share of images, in percent, that the model takes for the class prescribed; None without classes.
    """

    pictures: Tensor
    labels: Tensor | None
    steps: int
    entropy: float
    noise_entropy: float
    agreement: float | None


def synthesize(
    model: LoadedModel,
    num_images: int,
    seed: int,
    scratch: Path,
    max_minutes: float = 10,
    steps: int = STEPS,
    batch_size: int = 8,
    device: str = "cpu",
    progress: Callable[[float, float, str], None] | None = None,
    keep_scratch: bool = False,
) -> Synthesis:
    """Makes images from a model.

    Args:
        model: the float model.
        num_images: how many, N.
        seed: of all that is random.
        scratch: a folder for finished batches, kept when interrupted and removed at the end.
        max_minutes: what all of it may take by the time of a few steps; where the machine gets busier, it takes longer.
        steps: of each batch, at most.
        batch_size: images that descend together.
        device: where to compute.
        progress: called with (steps done, all of them, what is done).
        keep_scratch: leave the folder for whoever saves the images, so that a save that fails loses nothing.

    Raises:
        UsageError: a number that is too small, or minutes that do not suffice for one step of every batch.
        InputError: the model cannot be captured, has no patches to compare or takes no pictures.
    """
    if min(num_images, steps, batch_size) < 1 or not max_minutes > 0:
        given = f"{num_images} images in batches of {batch_size}, {steps} steps and {max_minutes} minutes"
        raise UsageError(f"{given} cannot be used; give 1 or more, and more than 0 minutes")
    channels, height, width = model.data_config["input_size"]
    if channels not in (1, 3):
        raise InputError(f"{model.source} takes images of {channels} channels, which are no pictures; give real ones")
    started = time.perf_counter()
    wanted = objective_of(capture(model.module, (channels, height, width), device))
    how = f"{model.digest} {wanted.graph.digest} {num_images} {seed} {max_minutes} {steps} {batch_size} {torch.__version__}"
    with Scratch(scratch, hashlib.sha256(how.encode()).hexdigest()) as kept:
        labels = _classes(model.num_classes, num_images, _generator(seed, "classes"))
        batches = [slice(first, min(first + batch_size, num_images)) for first in range(0, num_images, batch_size)]
        try:
            steps, noise_entropy = _fitted(kept, wanted, batches, labels, steps, 60 * max_minutes - (time.perf_counter() - started), seed)
        except UsageError:
            kept.remove()
            raise
        made = []
        for index, rows in enumerate(batches):
            done = kept.kept(f"batch.{index}")
            if done is None:

                def told(step: int, before: int = index * steps) -> None:
                    if progress:
                        progress(before + step, len(batches) * steps, f"{steps} steps")

                chosen = None if labels is None else labels[rows].to(device)
                generator = _generator(seed, f"batch {index}")
                images = descend(wanted, model.data_config, rows.stop - rows.start, chosen, steps, generator, told)
                done = {"pictures": pixels(images, model.data_config)}
                kept.keep(f"batch.{index}", done)
            made.append(done["pictures"])
        entropy, agreement = _judged(wanted, model, made, batches, labels)
        if not keep_scratch:
            kept.remove()
        return Synthesis(torch.cat(made), labels, steps, entropy, noise_entropy, agreement)


def _generator(seed: int, what: str) -> torch.Generator:
    """A source of randomness of its own for each thing, so that a batch depends on no other."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {what}".encode()).digest()[:7]))


def _classes(count: int, num_images: int, generator: torch.Generator) -> Tensor | None:
    """A class an image, int64 (N,): all of them in one random order after another."""
    if not count:
        return None
    orders = [torch.randperm(count, generator=generator) for _ in range(math.ceil(num_images / count))]
    return torch.cat(orders)[:num_images]


def _fitted(
    kept: Scratch, wanted: Objective, batches: list[slice], labels: Tensor | None, steps: int, seconds: float, seed: int
) -> tuple[int, float]:
    """The steps that fit the seconds, by the time of a few on noise, and the noise's entropy; as they were where the run goes on."""
    if (found := kept.kept("schedule")) is not None:
        return int(found["steps"]), float(found["noise_entropy"])
    device = next(wanted.graph.module.parameters()).device
    rows = batches[0]
    noise = torch.randn(rows.stop, *wanted.graph.input_shape, generator=_generator(seed, "noise")).to(device).requires_grad_()
    chosen = None if labels is None else labels[rows].to(device)
    variation = torch.zeros(rows.stop, device=device)
    begun = time.perf_counter()
    for tried in range(_TRIED):
        if tried == 1:
            begun = time.perf_counter()
        (slope,) = torch.autograd.grad(wanted.loss(noise, chosen, variation), noise)
        float(slope.sum())  # waits for a device that computes behind our back
    each = (time.perf_counter() - begun) / (_TRIED - 1)
    refuse_too_short(each * len(batches), seconds, rows.stop, len(batches))
    fitting = int(min(steps, seconds / (each * len(batches))))
    with torch.no_grad():
        entropy = float(wanted.parts(noise, None).entropy.mean())
    kept.keep("schedule", {"steps": torch.tensor(fitting), "noise_entropy": torch.tensor(entropy, dtype=torch.float64)})
    return fitting, entropy


def refuse_too_short(needed: float, seconds: float, batch_size: int, batches: int) -> None:
    """Raises UsageError where the seconds are fewer than those that a step of every batch needs."""
    if needed <= seconds:
        return
    fewer = int(max(seconds, 0) / needed * batches * 0.9) * batch_size  # a tenth off, since another run takes another time
    step = f"one step of each of {counted(batches, 'batch')} takes about {in_minutes(needed)}, which --max-minutes leaves no room for"
    less = f", or --num-images {fewer} or less" if fewer else ""
    raise UsageError(f"{step}; give --max-minutes {math.ceil(1.1 * (needed + 10) / 6) / 10:g} or more{less}")


def _judged(
    wanted: Objective, model: LoadedModel, made: list[Tensor], batches: list[slice], labels: Tensor | None
) -> tuple[float, float | None]:
    """The mean entropy of the pictures and the percentage of them that are of their classes."""
    device = next(wanted.graph.module.parameters()).device
    entropy, right = 0.0, 0
    for pictures, rows in zip(made, batches, strict=True):
        with torch.no_grad():
            parts = wanted.parts(preprocessed(pictures, model.data_config).to(device), None)
        entropy += float(parts.entropy.sum())
        right += 0 if labels is None else int((parts.output.argmax(1).cpu() == labels[rows]).sum())
    count = batches[-1].stop
    return entropy / count, None if labels is None else 100 * right / count
