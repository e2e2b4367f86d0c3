"""Reconstruction block by block from the front: the walk that recipes share, which differ in what a block learns, and from what.

The float and the quantized network advance side by side. When a block's turn comes, the blocks before it are quantized and what follows
is float; what the block has learned is kept in the scratch folder, so that a killed run goes on behind the last block that was finished.
Memory holds one batch: the values at a block's start and end are in files (streams.py). Block by block is BRECQ (Li et al., ICLR 2021).
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vitq.artifacts import Layer
from vitq.calibration.learning import Learning, Step
from vitq.calibration.scratch import Scratch
from vitq.calibration.streams import Stream, Values
from vitq.calibration.views import view
from vitq.checkpoint import Checkpoint
from vitq.graph import Graph, advance, start
from vitq.graph.run import Intercept
from vitq.ranges import Batches

Progress = Callable[[float, float, str], None]
"""Called with the work that is done, all of it in the same unit, and the name of the block that is learned."""


class Variables(Protocol):
    """What of a block is learned, and the block's layers under it."""

    @property
    def activations(self) -> set[str]:
        """The activations that are learned, by `Operand.tensor`."""
        ...

    def tensors(self, copied: bool = False) -> dict[str, Tensor]:
        """All variables by name, detached; as they are now, where `copied`."""
        ...

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the variables to what `tensors` gave."""
        ...

    def intercepts(self) -> dict[str, Intercept]:
        """What runs in the place of the layers' nodes: the layers quantized as the variables have it."""
        ...

    def checkpoint(self) -> Checkpoint:
        """The checkpoint with this block as the variables have it, rounded."""
        ...


V = TypeVar("V", bound=Variables)


@dataclass(frozen=True)
class Turn(Generic[V]):
    """A block whose turn it is to learn.

    `step` is the block under its variables, `rest` the float network behind it. `in_float` is what the float block reads and `after` what
    it makes of that; `in_quantized` what the block reads behind the quantized ones before it, for each set of images.
    """

    index: int
    variables: V
    step: Step
    rest: Step
    in_float: Stream
    after: Stream
    in_quantized: tuple[Stream, ...]
    generator: torch.Generator
    told: Callable[[float], None]


def block_by_block(
    floats: Graph,
    found: Checkpoint,
    streams: Sequence[Stream],
    variables_of: Callable[[Graph, Checkpoint, list[Layer], Collection[str]], V],
    learn: Callable[[Turn[V]], None],
    scratch: Scratch,
    seed: int,
    progress: Progress | None,
) -> Checkpoint:
    """The checkpoint with every block as it has learned to be.

    Args:
        floats: the folded float graph.
        found: the checkpoint to start from, of the same nodes.
        streams: sets of images at the graph's beginning (`images_at_start`); the float network goes through the first one alone.
        variables_of: makes a block's variables.
        learn: changes the variables of the block whose turn it is.
        scratch: keeps what is finished.
        seed: of the blocks' generators.
        progress: is told how far it is.
    """
    layers = _layers_of_blocks(floats)
    work = [sum(layer.macs for layer in some) for some in layers]
    settled = set[str]()
    in_float, in_quantized = streams[0], tuple(streams)
    for index, (block, (first, stop)) in enumerate(zip(floats.blocks, floats.stretches, strict=True)):
        variables = variables_of(floats, found, layers[index], settled)
        settled |= variables.activations
        step = partial(_advance, found.graph, first=first, stop=stop, variables=variables)
        rest = partial(_advance, floats, first=stop, stop=None) if stop else lambda values: values
        after = in_float.onwards(f"float.{index}", partial(_advance, floats, first=first, stop=stop))
        if layers[index]:
            kept = scratch.kept(block.name)
            if kept is None:
                generator = torch.Generator().manual_seed(seed * 1_000 + index)
                told = partial(_tell, progress, sum(work[:index]), work[index], sum(work), block.name)
                learn(Turn(index, variables, step, rest, in_float, after, in_quantized, generator, told))
                scratch.keep(block.name, variables.tensors())
            else:
                variables.put(kept)
        quantized = tuple(stream.onwards(f"quantized.{number}.{index}", step) for number, stream in enumerate(in_quantized))
        found = variables.checkpoint()
        for stream in (in_float, *in_quantized):
            stream.remove()
        in_float, in_quantized = after, quantized
    return found


def images_at_start(graph: Graph, scratch: Scratch, name: str, batches: Batches, chosen: Tensor, learning: Learning) -> Stream:
    """The chosen images, bool (N,), followed by their views, at the graph's beginning."""
    count, first, position = int(chosen.sum()), 0, 0
    rows = scratch.rows(f"{name}.pixels", count * learning.views)
    generator = torch.Generator().manual_seed(learning.seed)
    for images, _ in batches:
        some = images[chosen[position : position + len(images)]]
        position += len(images)
        for index in range(learning.views if len(some) else 0):
            rows.write(index * count + first, some if index == 0 else view(some, generator))
        first += len(some)
    size = min(learning.batch_size, rows.count)
    stream = Stream(scratch, name, rows.count, size, next(graph.module.parameters()).device)
    for numbers in stream.batches():
        stream.write(numbers, start(graph.module, rows.read(numbers)))
    rows.remove()
    return stream


def outputs(floats: Graph, stream: Stream, name: str) -> Stream:
    """What the float network gives for the images of a stream at its beginning, under "output"."""
    return stream.onwards(name, partial(_advance, floats, first=None, stop=None))


def digest(found: Checkpoint, batches: Batches, learning: Learning) -> str:
    """What the result of learning from a checkpoint depends on."""
    how = f"{learning.iterations} {learning.seed} {learning.batch_size} {learning.views} {learning.fisher} {torch.__version__}"
    hashed = hashlib.sha256(f"{found.plan.layers} {found.activations} {how}".encode())
    for tensor in found.graph.module.state_dict().values():
        hashed.update(tensor.cpu().contiguous().numpy().tobytes())
    for images, _ in batches:
        hashed.update(images.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _advance(graph: Graph, values: Values, first: str | None, stop: str | None, variables: Variables | None = None) -> Values:
    return advance(graph.module, values, first, stop, variables.intercepts() if variables else None)


def _layers_of_blocks(graph: Graph) -> list[list[Layer]]:
    names = {block.name: index for index, block in enumerate(graph.blocks)}
    found: list[list[Layer]] = [[] for _ in names]
    for layer in graph.layers:
        found[names[layer.block]].append(layer)
    return found


def _tell(progress: Progress | None, before: float, work: float, whole: float, block: str, part: float) -> None:
    if progress:
        progress(before + part * work, whole, block)
