"""Recipe `reconstruct`: the most accurate; block by block from the front, by gradients.

It starts from what recipe `fast` finds. Each block in turn reads what the quantized blocks before it make of an image, and learns to
give what the float block gives: weights, their scales, biases, and the activations' scales and zero points, all at once (variables.py).
What it minimises is the error of the block's output (errors.py); the end of the network, from the last block on, is trained by the KL of
the output itself. Block by block is BRECQ (Li et al., ICLR 2021), mixed inputs are QDrop (Wei et al., ICLR 2022), learned weights LSQ's.

An eighth of the images is never learned from. A block's result is taken only if on those it brings the whole network, with the later
blocks float, no farther from the float network; and if the end is worse there than what `fast` found, that is returned.

Memory holds one batch: the values at a block's start and end are in files of a scratch folder. A killed run that finds its folder again
goes on behind the last block that was finished, to the same bytes.
Differs from the papers: weights are learned straight through, not by AdaRound (learned.py); LayerNorms learn too (variables.py); views
of the images are learned from too (views.py).
Tried once and left out, 3/3: from `fast`, the whole network at once by the output's KL and all blocks' errors. Weights at 0.003 steps a
step, 32 views a batch of 1024 images: 200 of 300 steps, as long as all blocks take, left held-out images at 1.7 times the KL of `fast`.
"""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vitq.artifacts import BitPlan, Layer
from vitq.calibration.errors import block_error, output_error, weights_of_errors
from vitq.calibration.fast import fit_fast
from vitq.calibration.learning import Learning, learn
from vitq.calibration.scratch import Scratch
from vitq.calibration.streams import Stream, Values
from vitq.calibration.variables import BlockVariables
from vitq.calibration.views import view
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError, UsageError
from vitq.fitting import observe
from vitq.gradients import loss
from vitq.graph import Graph, advance, run, start
from vitq.ranges import Batches

HELD_OUT = 8
"""Of so many images one is held out."""

_BY_OUTPUT = 2  # blocks at the end of the network that the output's loss trains: the last one and the head

Progress = Callable[[float, float, str], None]
"""Called with the work that is done, all of it in the same unit, and the name of the block that is learned."""


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
    for name, value in (("iterations", learning.iterations), ("views", learning.views), ("batch_size", learning.batch_size)):
        if value < 1:
            raise UsageError(f"{name} {value} cannot be learned with; give at least 1, or recipe fast")
    plan.check(graph.layers)
    held = held_out(batches)
    if not bool(held.any()):
        raise InputError(f"{len(held)} images are too few for recipe reconstruct; give --num-images at least {HELD_OUT}, or --recipe fast")
    folded, histograms, covariances = observe(graph, batches)
    fast = fit_fast(folded, histograms, covariances, plan, batches, symmetric)
    scratch = Scratch(learning.scratch, _digest(fast, batches, learning))
    learned_from = _images(folded, scratch, "images", batches, ~held, learning)
    judged_on = _images(folded, scratch, "held", batches, held, learning)
    found = _reconstructed(folded, fast, learned_from, judged_on, learning, scratch, progress or (lambda done, whole, block: None))
    best = min((found, fast), key=lambda checkpoint: held_out_loss(checkpoint, folded, batches))
    scratch.remove()
    return best


def held_out(batches: Batches) -> Tensor:
    """Which images are held out: bool (N,)."""
    count = sum(len(images) for images, _ in batches)
    return torch.arange(count) % HELD_OUT == HELD_OUT - 1


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


def _digest(fast: Checkpoint, batches: Batches, learning: Learning) -> str:
    """What the result depends on."""
    how = f"{learning.iterations} {learning.seed} {learning.batch_size} {learning.views} {learning.fisher} {torch.__version__}"
    digest = hashlib.sha256(f"{fast.plan.layers} {fast.activations} {how}".encode())
    for tensor in fast.graph.module.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    for images, _ in batches:
        digest.update(images.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _images(graph: Graph, scratch: Scratch, name: str, batches: Batches, chosen: Tensor, learning: Learning) -> Stream:
    """The chosen images, followed by their views, at the graph's beginning."""
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


def _reconstructed(
    floats: Graph, fast: Checkpoint, learned_from: Stream, judged_on: Stream, learning: Learning, scratch: Scratch, progress: Progress
) -> Checkpoint:
    """The checkpoint with every block learned, or as `fast` has it where that is better."""
    loss_of = partial(loss, num_classes=fast.plan.model.num_classes)
    outputs = partial(_advance, floats, first=None, stop=None)
    wanted, judged_wanted = (stream.onwards(f"{name}.output", outputs) for name, stream in (("learn", learned_from), ("judge", judged_on)))
    layers = _layers_of_blocks(floats)
    work = [sum(layer.macs for layer in some) for some in layers]
    found, settled = fast, set[str]()
    in_float = in_quantized = learned_from
    judged = judged_on
    for index, (block, (first, stop)) in enumerate(zip(floats.blocks, floats.stretches, strict=True)):
        variables = BlockVariables(floats, found, layers[index], settled)
        settled |= variables.activations
        step = partial(_advance, found.graph, first=first, stop=stop, variables=variables)
        rest = partial(_advance, floats, first=stop, stop=None) if stop else lambda values: values
        after = in_float.onwards(f"float.{index}", partial(_advance, floats, first=first, stop=stop))
        if layers[index]:
            kept = scratch.kept(block.name)
            if kept is None:
                before, at_first = _judged(judged, judged_wanted, step, rest, loss_of), variables.tensors(copied=True)
                generator = torch.Generator().manual_seed(learning.seed * 1_000 + index)
                if index >= len(layers) - _BY_OUTPUT:
                    error = partial(output_error, rest=rest, wanted=wanted, loss_of=loss_of)
                else:
                    weights = weights_of_errors(after, rest, fast.plan.model.num_classes, generator) if learning.fisher else {}
                    error = partial(block_error, wanted=after, weights=weights)
                told = partial(_tell, progress, sum(work[:index]), work[index], sum(work), block.name)
                learn(variables, step, in_float, in_quantized, error, learning, generator, told)
                if not _judged(judged, judged_wanted, step, rest, loss_of) <= before:
                    variables.put(at_first)
                scratch.keep(block.name, variables.tensors())
            else:
                variables.put(kept)
        in_quantized_after, judged_after = (
            stream.onwards(f"{name}.{index}", step) for name, stream in (("quantized", in_quantized), ("judged", judged))
        )
        found = variables.checkpoint()
        for stream in (in_float, in_quantized, judged):
            stream.remove()
        in_float, in_quantized, judged = after, in_quantized_after, judged_after
    return found


def _advance(graph: Graph, values: Values, first: str | None, stop: str | None, variables: BlockVariables | None = None) -> Values:
    return advance(graph.module, values, first, stop, variables.intercepts() if variables else None)


def _layers_of_blocks(graph: Graph) -> list[list[Layer]]:
    names = {block.name: index for index, block in enumerate(graph.blocks)}
    found: list[list[Layer]] = [[] for _ in names]
    for layer in graph.layers:
        found[names[layer.block]].append(layer)
    return found


def _judged(judged: Stream, wanted: Stream, step: Callable[[Values], Values], rest: Callable[[Values], Values], loss_of: Callable) -> float:
    """The mean loss of the network on the images that are judged on, with all that follows the step float."""
    with torch.no_grad():
        losses = [loss_of(wanted.read(some)["output"], rest(step(judged.read(some)))["output"]) for some in judged.batches()]
    return float(torch.cat(losses).mean())


def _tell(progress: Progress, before: float, work: float, whole: float, block: str, part: float) -> None:
    progress(before + part * work, whole, block)
