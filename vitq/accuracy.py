"""Accuracy of anything that maps images to logits: a float model, a calibrated one, an ONNX file; alone and against the float model.

Differences from the float model are paired, image by image, so their intervals are much narrower than those of two separate runs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitq.errors import InputError
from vitq.runtime import open_session

Runnable = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) float32 to logits (B, K), or to a backbone's features."""


@dataclass(frozen=True)
class Estimate:
    """A mean over images with the half width of its 95 % confidence interval (normal approximation)."""

    mean: float
    margin: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured; each field is None where it does not apply.

    `top1`, `top5` and `top1_change` (against the reference, paired) are percent, `agreement` percent of images whose top-1 equals the
    reference's, `kl` the mean KL(reference || this) of the softmax in nats per image, `cosine` and `relative_error` compare a
    backbone's features with the reference's.
    """

    num_images: int
    top1: Estimate | None = None
    top5: Estimate | None = None
    top1_change: Estimate | None = None
    agreement: Estimate | None = None
    kl: Estimate | None = None
    cosine: Estimate | None = None
    relative_error: Estimate | None = None


def evaluate(
    artifact: Runnable, images: Iterable[tuple[Tensor, Tensor | None]], reference: Runnable | None = None, classifier: bool = True
) -> Evaluation:
    """Runs an artifact over images, and the reference beside it where there is one.

    Args:
        artifact: what to measure.
        images: batches of (images (B, 3, H, W), labels (B,) or None); gone through once.
        reference: the float model.
        classifier: whether outputs are logits; otherwise features are compared.

    Raises:
        InputError: no images, or an artifact whose output has another shape than the reference's.
    """
    sums: dict[str, _Sum] = {}
    count = 0
    with torch.no_grad():
        for batch, labels in images:
            output = artifact(batch).double()  # differences of 1e-6 nats are to be seen
            expected = reference(batch).double() if reference is not None else None
            if expected is not None and expected.shape != output.shape:
                shapes = f"{tuple(output.shape)}, the float model's {tuple(expected.shape)}"
                raise InputError(f"the outputs differ in shape: {shapes}; give the float model that the artifact was made from")
            count += len(batch)
            for name, values in _measures(output, expected, labels, classifier).items():
                sums.setdefault(name, _Sum()).add(values)
    if count == 0:
        raise InputError("there were no images to evaluate on; give --images a folder or .tar that holds some")
    return Evaluation(count, **{name: total.estimate() for name, total in sums.items()})


def onnx_runnable(path: str | Path, threads: int = 0) -> Runnable:
    """An ONNX file as a function of images, run by onnxruntime on the CPU with the options that the file says it needs.

    A file that was made for one batch size only is given its batches, the last one filled up.

    Raises:
        InputError: the file is missing or onnxruntime cannot load it.
    """
    session = open_session(path, threads)
    given = session.get_inputs()[0]
    size = given.shape[0] if given.shape and isinstance(given.shape[0], int) else None

    def run(images: Tensor) -> Tensor:
        parts = images.cpu().split(size or max(len(images), 1))
        return torch.cat([run_part(part) for part in parts])

    def run_part(images: Tensor) -> Tensor:
        missing = 0 if size is None else size - len(images)
        filled = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])]) if missing else images
        return torch.from_numpy(session.run(None, {given.name: filled.numpy()})[0])[: len(images)]

    return run


class _Sum:
    """Count, sum and sum of squares of per-image values, all that a mean and its interval need."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        self.count += len(values)
        self.total += float(values.double().sum())
        self.squares += float(values.double().square().sum())

    def estimate(self) -> Estimate:
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean * mean, 0.0)
        return Estimate(mean, 1.96 * math.sqrt(variance / self.count))


def _measures(output: Tensor, expected: Tensor | None, labels: Tensor | None, classifier: bool) -> dict[str, Tensor]:
    """Per-image values of everything that can be measured, each (B,)."""
    found: dict[str, Tensor] = {}
    if not classifier:
        if expected is not None:
            ours, theirs = output.flatten(1), expected.flatten(1)
            found["cosine"] = torch.nn.functional.cosine_similarity(ours, theirs)
            found["relative_error"] = (ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-12)
        return found
    predicted = output.argmax(1)
    if labels is not None:
        correct = (predicted == labels).double()
        found["top1"] = 100 * correct
        found["top5"] = 100 * (output.topk(min(5, output.shape[1])).indices == labels[:, None]).any(1).double()
    if expected is not None:
        p = expected.log_softmax(1)
        found["agreement"] = 100 * (predicted == expected.argmax(1)).double()
        found["kl"] = (p.exp() * (p - output.log_softmax(1))).sum(1)
        if labels is not None:
            found["top1_change"] = 100 * (correct - (expected.argmax(1) == labels).double())
    return found
