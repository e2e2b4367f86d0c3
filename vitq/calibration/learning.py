"""Learns a block's variables: Adam on an error, a few hundred steps, rates that fall to nothing along half a cosine."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitq.calibration.streams import Stream, Values
from vitq.calibration.variables import BlockVariables
from vitq.errors import UsageError

MOMENTA = (0.9, 0.99)  # a second moment that forgets in a hundred steps: there are only a few hundred
_DROPPED = 0.5  # of the elements of a block's input, taken from the float network: QDrop (Wei et al., ICLR 2022)

Step = Callable[[Values], Values]
"""From the values at a block's start to those at its end."""


@dataclass(frozen=True)
class Learning:
    """How blocks are learned.

    `iterations` steps a block, each on `batch_size` images; `views` of each image, itself included (views.py); `seed` for views, batches
    and drops; `scratch` the folder for what grows with the number of images; `fisher` weighs errors by Fisher information. With
    `keep_scratch` the folder stays for whoever saves the result, so that a save that fails loses nothing.
    """

    iterations: int = 150
    seed: int = 0
    scratch: Path = Path("vitq-scratch")
    batch_size: int = 32
    views: int = 8
    fisher: bool = True
    keep_scratch: bool = False

    def check(self) -> None:
        """Raises UsageError where there is fewer than one iteration, view or image a batch."""
        for name, value in (("iterations", self.iterations), ("views", self.views), ("batch_size", self.batch_size)):
            if value < 1:
                raise UsageError(f"{name} {value} cannot be learned with; give at least 1, or recipe fast")


def learn(
    variables: BlockVariables,
    step: Step,
    in_float: Stream,
    in_quantized: Stream,
    error: Callable[[Values, Tensor], Tensor],
    learning: Learning,
    generator: torch.Generator,
    told: Callable[[float], None],
) -> None:
    """Changes the variables to make the error small.

    Args:
        variables: of one block.
        step: the block under the variables.
        in_float: what the float network's block reads.
        in_quantized: what it reads behind the quantized blocks before it.
        error: of what the block gives for some images, by their numbers; a scalar.
        learning: how.
        generator: of batches and drops.
        told: is called with the part that is done.
    """
    optimizer = torch.optim.Adam(variables.groups(), betas=MOMENTA)
    batches = shuffled(in_float, generator)
    with torch.enable_grad():
        for iteration in range(learning.iterations):
            images = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 + math.cos(math.pi * iteration / learning.iterations)) / 2
            found = error(step(mixed(in_float.read(images), in_quantized.read(images), generator)), images)
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            told((iteration + 1) / learning.iterations)
    variables.freeze()


def shuffled(stream: Stream, generator: torch.Generator) -> Iterator[Tensor]:
    """The numbers of images for one step after the other, whole batches in an order that is drawn anew each time all have come."""
    while True:
        order = torch.randperm(stream.count, generator=generator).split(stream.batch_size)
        yield from (images for images in reversed(order) if len(images) == stream.batch_size)


def mixed(floats: Values, quantized: Values, generator: torch.Generator) -> Values:
    """Each element from the one or the other; what is no floating point tensor is the quantized network's."""

    def either(name: str, value: object) -> object:
        return dropped(floats[name], value, generator) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: either(name, value) for name, value in quantized.items()}


def dropped(floats: Tensor, quantized: Tensor, generator: torch.Generator) -> Tensor:
    """Each element from the one or the other."""
    return torch.where(torch.rand(quantized.shape, generator=generator).to(quantized.device) < _DROPPED, floats, quantized)
