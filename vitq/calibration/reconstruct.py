"""Recipe `reconstruct`: the most accurate; block by block from the front, by gradients.

Each block in turn reads what the quantized blocks before it make of an image, and learns to give what the float block gives: weights,
their scales, biases, and the activations' scales and zero points, all at once (variables.py). It starts from what recipe `fast` finds.
What it minimises is the error of the block's output (errors.py); the end of the network, from the last block on, is trained by the KL of
the output itself. Block by block is BRECQ (Li et al., ICLR 2021), mixed inputs are QDrop (Wei et al., ICLR 2022), learned weights LSQ's.

An eighth of the images is held out, of `fast` too. A block's result is taken only if on those it brings the whole network, with the later
blocks float, no farther from the float network; and if the end is worse there than what `fast` found, that is returned.

A killed run that finds its scratch folder again goes on behind the last block that was finished, to the same bytes (blocks.py).
Differs from the papers: weights are learned straight through, not by AdaRound (learned.py); LayerNorms learn too (variables.py); views
of the images are learned from too (views.py).
Tried once and left out, 3/3: from `fast`, the whole network at once by the output's KL and all blocks' errors. Weights at 0.003 steps a
step, 32 views a batch of 1024 images: 200 of 300 steps, as long as all blocks take, left held-out images at 1.7 times the KL of `fast`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vitq.artifacts import BitPlan
from vitq.calibration.blocks import Progress, Turn, block_by_block, digest, images_at_start, outputs
from vitq.calibration.errors import block_error, output_error, weights_of_errors
from vitq.calibration.fast import fit_fast
from vitq.calibration.learning import Learning, Step, learn
from vitq.calibration.scratch import Scratch
from vitq.calibration.streams import Stream
from vitq.calibration.variables import BlockVariables
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError
from vitq.gradients import loss
from vitq.graph import Graph, run
from vitq.ranges import Batches, fold

HELD_OUT = 8
"""Of so many images one is held out."""

_BY_OUTPUT = 2  # blocks at the end of the network that the output's loss trains: the last one and the head


def calibrate_reconstruct(
    graph: Graph,
    plan: BitPlan,
    batches: Batches,
    symmetric: bool = False,
    learning: Learning | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images; gone through about ten times.
        symmetric: weights without zero points, at every width.
        learning: how blocks are learned; where its scratch folder holds finished blocks of the same calibration, it goes on there.
        progress: is told how far it is.

    Raises:
        InputError: the plan does not fit the graph, there are too few images, or the scratch folder cannot be used.
        UsageError: fewer than one iteration, view or image a batch.
    """
    learning = learning or Learning()
    learning.check()
    plan.check(graph.layers)
    held = held_out(batches)
    if not bool(held.any()):
        raise InputError(f"{len(held)} images are too few for recipe reconstruct; give --num-images at least {HELD_OUT}, or --recipe fast")
    others = Others(batches, held)  # `fast` must not know those that it is compared on
    folded, histograms = fold(graph, others)
    fast = fit_fast(folded, histograms, plan, others, symmetric)
    with Scratch(learning.scratch, digest(fast, batches, learning)) as scratch:
        streams = [images_at_start(folded, scratch, name, batches, which, learning) for name, which in (("images", ~held), ("held", held))]
        wanted, judged_wanted = (
            outputs(folded, stream, f"{name}.output") for name, stream in zip(("learn", "judge"), streams, strict=True)
        )
        loss_of = partial(loss, num_classes=plan.model.num_classes)

        def learn_block(turn: Turn[BlockVariables]) -> None:
            learned_from, judged_on = turn.in_quantized
            before, at_first = _judged(judged_on, judged_wanted, turn.step, turn.rest, loss_of), turn.variables.tensors(copied=True)
            if turn.index >= len(folded.blocks) - _BY_OUTPUT:
                error = partial(output_error, rest=turn.rest, wanted=wanted, loss_of=loss_of)
            else:
                weights = weights_of_errors(turn.after, turn.rest, plan.model.num_classes, turn.generator) if learning.fisher else {}
                error = partial(block_error, wanted=turn.after, weights=weights)
            learn(turn.variables, turn.step, turn.in_float, learned_from, error, learning, turn.generator, turn.told)
            if not _judged(judged_on, judged_wanted, turn.step, turn.rest, loss_of) <= before:
                turn.variables.put(at_first)

        found = block_by_block(folded, fast, streams, BlockVariables, learn_block, scratch, learning.seed, progress)
        best = min((found, fast), key=lambda checkpoint: held_out_loss(checkpoint, folded, batches))
        if not learning.keep_scratch:
            scratch.remove()
        return best


def held_out(batches: Batches) -> Tensor:
    """Which images are held out: bool (N,)."""
    count = sum(len(images) for images, _ in batches)
    return torch.arange(count) % HELD_OUT == HELD_OUT - 1


@dataclass(frozen=True)
class Others:
    """The batches without the images that are held out."""

    batches: Batches
    held: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Goes through them; a batch of which all are held out is left out."""
        first = 0
        for images, labels in self.batches:
            kept = ~self.held[first : first + len(images)]
            first += len(images)
            if bool(kept.any()):
                yield images[kept], None if labels is None else labels[kept]


def held_out_loss(checkpoint: Checkpoint, floats: Graph, batches: Batches) -> float:
    """The mean loss of a checkpoint (`gradients.loss`) on the images that are held out."""
    held, module, total, first = held_out(batches), checkpoint.quantized_module(), 0.0, 0
    with torch.no_grad():
        for images, _ in batches:
            some = images[held[first : first + len(images)]].to(next(module.parameters()).device)
            first += len(images)
            if len(some):
                total += float(loss(run(floats.module, some), module(some), checkpoint.plan.model.num_classes).sum())
    return total / int(held.sum())


def _judged(judged: Stream, wanted: Stream, step: Step, rest: Step, loss_of: Callable) -> float:
    """The mean loss of the network on the images that are judged on, with all that follows the step float."""
    with torch.no_grad():
        losses = [loss_of(wanted.read(some)["output"], rest(step(judged.read(some)))["output"]) for some in judged.batches()]
    return float(torch.cat(losses).mean())
