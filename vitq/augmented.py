"""Images to train on: a source's pictures in random order, each time another view of them, by timm's training transforms.

Which pictures a step sees, and how each is cropped, turned and coloured, depends on the seed and the step alone. So a run that goes on
at some step sees what it would have seen; the number of processes that read, or that share a batch, changes no picture. timm draws from
the generators of Python, NumPy and torch that all programs share: while a picture is made they are set for it, then put back.

Left out: what is preprocessed already (float32 in an images.safetensors) is used as it is, not augmented.
"""

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from vitq.errors import InputError, UsageError
from vitq.images import Batch, Images


@dataclass(frozen=True)
class Augmentation:
    """timm's training transform, by its own names, gentler than its defaults for training from scratch.

    A crop of at least `min_scale` of the area is resized to the model's input, mirrored with probability `hflip`, its colours changed by
    `color_jitter`; `aa` is an AutoAugment or RandAugment policy (rand-m9-mstd0.5), `reprob` the probability that a part is erased, `mixup`
    the alpha of mixing two pictures of a batch; 0 and None: off.
    """

    min_scale: float = 0.5
    hflip: float = 0.5
    color_jitter: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    mixup: float = 0.0

    def check(self) -> None:
        """Raises UsageError for what timm does not take, before a model is loaded."""
        self.transform({"input_size": (3, 32, 32), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3})

    def transform(self, data_config: dict[str, Any]) -> Any:
        """From a picture to a float32 tensor (C, H, W), preprocessed for the model.

        Raises:
            UsageError: timm does not take these options.
        """
        if self.aa is not None and not _POLICY.fullmatch(self.aa):  # timm leaves out what it does not know, or stops with an assertion
            raise UsageError(f"--aa {self.aa!r} is no policy of timm's; {_POLICIES}, or leave it out")
        try:
            return create_transform(
                input_size=tuple(data_config["input_size"]),
                is_training=True,
                scale=(self.min_scale, 1.0),
                hflip=self.hflip,
                color_jitter=self.color_jitter or None,  # type: ignore[arg-type]  # timm takes None for none
                auto_augment=self.aa,
                interpolation=data_config["interpolation"],
                mean=data_config["mean"],
                std=data_config["std"],
                re_prob=self.reprob,
            )
        except Exception as error:  # timm asserts, and parses policies by hand
            if self.aa is None:
                raise UsageError(f"timm builds no augmentation with {vars(self)}: {error!r:.200}; correct these") from None
            raise UsageError(f"--aa {self.aa!r} is no policy of timm's; {_POLICIES}, or leave it out") from None


_NUMBER = r"\d+(\.\d*)?"
_POLICY = re.compile(
    rf"rand(-((m|n|mstd|mmax|inc|p){_NUMBER}|t[a-z]*))*|augmix(-(m|w|d|a|b|mstd){_NUMBER})*|(original|originalr|v0|v0r|3a)(-mstd{_NUMBER})?"
)
_POLICIES = "give rand-m9-mstd0.5 or the like, augmix-m5-w4-d2 or the like, or one of original, originalr, v0, v0r, 3a"


class TrainingImages:
    """Batches for one training step after the other, from some of the images of a source.

    A batch is (images, float32 (B, C, H, W); labels, int64 (B,), or float32 (B, K), where pictures are mixed, or None).
    """

    def __init__(
        self,
        images: Images,
        rows: Sequence[int],
        augmentation: Augmentation,
        batch_size: int,
        seed: int,
        num_classes: int = 0,
        workers: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Opens nothing yet.

        Args:
            images: the source; what cannot be read is added to its `skipped`.
            rows: the numbers of the images to train on.
            augmentation: how they are changed.
            batch_size: images a step, of all processes together.
            seed: of the order and of the views.
            num_classes: of the model, for labels that are mixed.
            workers: processes that decode; 0 decodes in this one.
            share: of (number, count) processes that share a batch, this one reads the number-th part.

        Raises:
            UsageError: timm does not take the augmentation, or the processes cannot share a batch equally.
            InputError: there are fewer images than a batch takes.
        """
        if len(rows) < batch_size:
            held = images.num_listed - len(rows)
            given = f" ({images.num_listed} without the {held} that are held out to judge by)" if held else ""
            raise InputError(
                f"{len(rows)} images to train on{given} are no batch of {batch_size}; give more images or a smaller --batch-size"
            )
        if batch_size % share[1]:
            raise UsageError(
                f"{share[1]} processes cannot share batches of {batch_size} images; give --batch-size a multiple of {share[1]}"
            )
        self._images, self._rows, self._size, self._seed, self._share = images, list(rows), batch_size, seed, share
        self._workers, self._mixup = workers, None
        if augmentation.mixup > 0:
            self._mixup = Mixup(mixup_alpha=augmentation.mixup, label_smoothing=0.0, num_classes=max(num_classes, 1))
        self._views = _Views(replace(images.loader.dataset, transform=augmentation.transform(images.data_config)), seed)  # type: ignore[type-var]

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; what is left over of one pass may come in the next."""
        return len(self._rows) // self._size

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The batches of this process from step `first` on, without end.

        Raises:
            InputError: more than 5 % of the images cannot be read, or all of a batch.
        """
        loader = DataLoader(
            self._views,
            batch_sampler=_Steps(self, first),
            num_workers=self._workers,
            collate_fn=self._images.loader.collate_fn,
            generator=torch.Generator(),
        )
        for step, (images, labels, faults) in zip(count(first), loader, strict=False):
            self._images.skip(faults)
            if images is None:
                raise InputError(f"{self._images.source}: no image of a batch can be read: {'; '.join(faults[:5])}. Remove or replace them")
            labels = labels if self._images.labelled else None
            yield self._mixed(images, labels, step) if self._mixup is not None and len(images) % 2 == 0 else (images, labels)

    def keys(self, step: int) -> list[tuple[int, int]]:
        """(pass, number of the image) for this process's part of a step's batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(_number(f"{self._seed} order {epoch}")))
        batch = order[position * self._size : (position + 1) * self._size].tolist()
        number, processes = self._share
        part = len(batch) // processes
        return [(epoch, self._rows[index]) for index in batch[number * part : (number + 1) * part]]

    def _mixed(self, images: Tensor, labels: Tensor | None, step: int) -> Batch:
        assert self._mixup is not None
        with _drawing(f"{self._seed} mixup {step} {self._share}"):
            mixed, targets = self._mixup(images, torch.zeros(len(images), dtype=torch.int64) if labels is None else labels)
        return mixed, None if labels is None else targets


def untouched(images: Images, rows: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """Some images of a source, by their numbers, as they are evaluated."""
    rows = list(rows)
    loader = DataLoader(Subset(images.loader.dataset, rows), batch_size, collate_fn=images.loader.collate_fn, generator=torch.Generator())
    for batch, labels, faults in loader:
        images.skip(faults)
        if batch is not None:
            yield batch, labels if images.labelled else None


@dataclass(frozen=True)
class _Steps:
    """A batch sampler that never ends."""

    source: TrainingImages
    first: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.source.keys, count(self.first))


@dataclass(frozen=True)
class _Views(Dataset[Any]):
    """One view an item: of (pass, number of the image)."""

    items: Any
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with _drawing(f"{self.seed} view {key}"):
            return self.items[key[1]]


@contextmanager
def _drawing(seed: str) -> Iterator[None]:
    """The shared generators set by a seed while inside, and then as they were before."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002 (timm's)
    number = _number(seed)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7])
