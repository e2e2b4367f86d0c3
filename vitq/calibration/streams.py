"""The values alive at a cut of the graph for all images, in files, and both networks' way from one cut to the next, a batch at a time.

A tensor at a cut holds its images in order, each with as many rows of the first axis as any other (one; for a windowed network its
windows). Numbers that travel along, such as the batch size, are kept for each size of a batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vitq.calibration.scratch import Rows, Scratch
from vitq.errors import InputError

Values = dict[str, Any]
"""What is alive at a cut, by node name (`graph.advance`)."""


class Stream:
    """The values at one cut for `count` images."""

    def __init__(self, scratch: Scratch, name: str, count: int, batch_size: int, device: torch.device) -> None:
        """An empty stream; its files are called after `name`.

        Args:
            scratch: where the files are.
            name: of this stream.
            count: images.
            batch_size: images a batch, of which at least one is whole.
            device: where batches are wanted.
        """
        self.count, self.batch_size = count, batch_size
        self._scratch, self._name, self._device = scratch, name, device
        self._rows: dict[str, Rows] = {}
        self._numbers: dict[int, Values] = {}

    def batches(self) -> Iterator[Tensor]:
        """The numbers of the images, batch by batch, in order; the last one may be smaller."""
        return iter(torch.arange(self.count).split(self.batch_size))

    def write(self, images: Tensor, values: Values) -> None:
        """Keeps what a batch of consecutive images has at the cut."""
        self._numbers[len(images)] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        for name, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if value.shape[0] % len(images):
                shape = tuple(value.shape)
                raise InputError(f"{name} is {shape} for {len(images)} images, so its rows are no images; calibrate with --recipe fast")
            if name not in self._rows:
                self._rows[name] = self._scratch.rows(f"{self._name}.{name}", self.count)
            self._rows[name].write(int(images[0]), value.reshape(len(images), -1, *value.shape[1:]))

    def read(self, images: Tensor) -> Values:
        """What is alive for some images; as many as a batch that was written has."""
        tensors = {name: rows.read(images).flatten(0, 1).to(self._device) for name, rows in self._rows.items()}
        return tensors | self._numbers[len(images)]

    def onwards(self, name: str, step: Callable[[Values], Values]) -> "Stream":
        """The stream that `step` makes of this one, batch by batch, without gradients."""
        after = Stream(self._scratch, name, self.count, self.batch_size, self._device)
        with torch.no_grad():
            for images in self.batches():
                after.write(images, step(self.read(images)))
        return after

    def remove(self) -> None:
        """Deletes the files."""
        for rows in self._rows.values():
            rows.remove()
