"""Recipe `fima-q`: block reconstruction by an approximated Fisher information, FIMA-Q (Wu et al., CVPR 2025).

All quantizers are uniform. LayerNorms are folded channel by channel (channelwise.py); other ranges have the least error of the output of
the layer that reads, weights too (fitting/output_error.py). Then each block from the front learns which weights are rounded up (AdaRound,
rounding.py) and its activations' scales, while half of what it reads, at its start and at every layer, is float (QDrop, Wei et al., 2022).

A change d of a block's output y costs d F d^T / 2 of the network's KL divergence, whose gradient is therefore F d: linear in the Fisher
information F, where BRECQ takes the gradient's squares for the diagonal. The block as it is quantized at the moment is such
a change. Five times, evenly over all iterations, it is observed: sizes |d| and |F d|, both means over the images, are one more row of D and
G, (k, n), so that the rank k grows from 1 to 5. For the block's error e = |y^ - y|, (n,) for one image, the loss is

    L_lr = e G^T (D D^T)^-1 G e^T                                       low rank
    L_diag = e^2 . (mean of G's rows)                                   diagonal
    L = L_lr / first L_lr + L_diag / first L_diag + 0.01 penalty        AdaRound's, of all weights

with L_lr and L_diag means over a batch, and the first ones those at the last observation. The KL is that of logits divided by 20. The last
block minimises the KL itself.

Differs from the paper: L is that of the authors' code; (D D^T)^-1 is a pseudo-inverse, since a block that has settled is observed twice;
300 iterations, where the paper has 20,000 on 1,024 images, with the rate of v in proportion; scales learn as logarithms, at a rate of
ours; Adam forgets sooner; one quantizer for all heads of an attention; the head's block holds the last LayerNorm; folded ranges are
quantiles, and ranges are searched once, where the paper has three rounds.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight
from vitq.artifacts import BitPlan, Layer, Operand
from vitq.calibration.assemble import assemble
from vitq.calibration.blocks import Progress, Turn, block_by_block, digest, images_at_start, outputs
from vitq.calibration.channelwise import fit_in_sequence, fold_channelwise
from vitq.calibration.errors import output_error
from vitq.calibration.learned import learned_activation, straight_through
from vitq.calibration.learning import MOMENTA, Learning, dropped, mixed, shuffled
from vitq.calibration.rounding import beta_at, first_variables, penalty, rounded, softly_rounded
from vitq.calibration.scratch import Scratch
from vitq.calibration.streams import Stream, Values
from vitq.checkpoint import Checkpoint
from vitq.fitting import FITS
from vitq.fitting.output_error import refined_by_output, weight_by_output
from vitq.gradients import loss
from vitq.graph import Graph, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.graph.run import Intercept
from vitq.quantizers import Quantizer, Uniform
from vitq.ranges import Batches, add

LEARNING = Learning(iterations=300, views=1)
"""How blocks are learned by default."""

RANK = 5
"""Of the Fisher information's low-rank part, in the end."""

_FITTED_ON = 128  # images that ranges and folds are fitted to
_TEMPERATURE = 20.0
_PENALTY = 0.01
_ROUNDING_RATE = 1e-3 * 20_000  # divided by the iterations: v can go as far as in the paper's 20,000
_LARGEST_RATE = 0.1  # of a v that goes from 0 to 1 between -2.4 and 2.4
_SCALE_RATE = 0.005  # of a scale's logarithm


def calibrate_fima_q(
    graph: Graph,
    plan: BitPlan,
    batches: Batches,
    symmetric: bool = False,
    learning: Learning = LEARNING,
    progress: Progress | None = None,
) -> Checkpoint:
    """Calibrates a rewritten graph to a plan.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer; checked against the graph's layers.
        batches: the calibration images, 1,024 in the paper; the first 128 are held in memory.
        symmetric: weights without zero points, at every width.
        learning: how blocks are learned; where its scratch folder holds finished blocks of the same calibration, it goes on there.
        progress: is told how far it is.

    Raises:
        InputError: the plan does not fit the graph, or the scratch folder cannot be used.
        UsageError: fewer than one iteration, view or image a batch.
    """
    learning.check()
    plan.check(graph.layers)
    first = fit_uniform(graph, plan, _first_images(batches), symmetric)
    folded = first.floats
    assert folded is not None
    with Scratch(learning.scratch, digest(first, batches, learning)) as scratch:
        all_images = torch.ones(sum(len(images) for images, _ in batches), dtype=torch.bool)
        learned_from = images_at_start(folded, scratch, "images", batches, all_images, learning)
        wanted = outputs(folded, learned_from, "output")

        def learn(turn: Turn[RoundedBlock]) -> None:
            learn_block(turn, wanted, plan.model.num_classes, turn.index == len(folded.blocks) - 1, learning.iterations)

        found = block_by_block(folded, first, [learned_from], RoundedBlock, learn, scratch, learning.seed, progress)
        if not learning.keep_scratch:
            scratch.remove()
        return found


def fit_uniform(graph: Graph, plan: BitPlan, batches: Batches, symmetric: bool = False) -> Checkpoint:
    """Where learning starts: uniform quantizers with the least error of the readers' outputs, weights rounded to the nearest code."""

    def fit(x: Tensor, bits: int, operand: Operand, error: Callable[[Quantizer], float]) -> Quantizer:
        return refined_by_output(FITS["uniform"](add(None, x), bits), error)

    def weigh(weight: Tensor, x: Tensor, bits: int) -> QuantizedWeight:
        rows = x.reshape(-1, x.shape[-1])
        return weight_by_output(weight, rows.T @ rows / len(rows), bits, symmetric)

    folded, activations = fold_channelwise(graph, plan, batches, fit)
    return assemble(folded, plan, fit_in_sequence(folded, plan, activations, batches, weigh, symmetric), activations)


class RoundedBlock:
    """What of a block is learned: v of every weight (rounding.py), and the logarithm of every activation's scale by that at first."""

    def __init__(self, floats: Graph, checkpoint: Checkpoint, layers: list[Layer], settled: Collection[str] = ()) -> None:
        """Starts at the checkpoint.

        Args:
            floats: the folded float graph that the checkpoint was made from.
            checkpoint: where learning starts.
            layers: the block's layers.
            settled: activations that an earlier block reads too, and has learned.
        """
        self.drops: torch.Generator | None = None
        """While it is set, the block is learning: its weights are rounded softly, and half of what its layers read is float."""
        self._floats, self._checkpoint, self._layers = floats, checkpoint, layers
        nodes = {layer.name: operand_nodes(floats.layer_node(layer.name)) for layer in layers if layer.has_weight}
        self._weights = {name: tensor_of(floats.module, operands[1]).detach() for name, operands in nodes.items()}
        self._roundings = {name: first_variables(weight, checkpoint.weights[name].scale) for name, weight in self._weights.items()}
        read = {operand.tensor for layer in layers for operand in layer.activations} - set(settled)
        self._scales = {tensor: torch.zeros((), device=_device(floats)) for tensor in sorted(read)}

    @property
    def activations(self) -> set[str]:
        """The activations that are learned, by `Operand.tensor`."""
        return set(self._scales)

    @property
    def roundings(self) -> list[Tensor]:
        """The v of every weight, of the weight's shape."""
        return list(self._roundings.values())

    @property
    def scales(self) -> list[Tensor]:
        """The logarithms of the scales' changes, of no dimension."""
        return list(self._scales.values())

    def tensors(self, copied: bool = False) -> dict[str, Tensor]:
        """All variables by name, detached; as they are now, where `copied`."""
        found = {f"rounding:{name}": value.detach() for name, value in self._roundings.items()}
        found |= {f"scale:{name}": value.detach() for name, value in self._scales.items()}
        return {name: value.clone() for name, value in found.items()} if copied else found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the variables to what `tensors` gave."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    def intercepts(self) -> dict[str, Intercept]:
        """What runs in the place of the layers' nodes: the layers quantized as the variables have it."""
        return {self._floats.nodes[layer.name]: self._intercept(layer) for layer in self._layers}

    def checkpoint(self) -> Checkpoint:
        """The checkpoint with this block as the variables have it, rounded."""
        before = self._checkpoint
        weights = dict(before.weights) | {name: self._rounded(name) for name in self._weights}
        activations = dict(before.activations) | {tensor: self._quantizer(tensor) for tensor in self._scales}
        return assemble(self._floats, before.plan, weights, activations)

    def _intercept(self, layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            count = len(layer.activations)
            read = [self._read(operand.tensor, x) for operand, x in zip(layer.activations, arguments, strict=False)]
            return compute(*read, *([self._weight(layer.name)] if layer.has_weight else []), *arguments[count + layer.has_weight :])

        return intercept

    def _read(self, tensor: str, x: Tensor) -> Tensor:
        quantizer = self._checkpoint.activations[tensor]
        if tensor in self._scales:
            assert isinstance(quantizer, Uniform)
            scale = quantizer.scale * self._scales[tensor].exp()
            quantized = learned_activation(x, scale, torch.full_like(scale, quantizer.zero_point), quantizer.bits)
        else:
            quantized = straight_through(x, quantizer)
        return quantized if self.drops is None else dropped(x, quantized, self.drops)

    def _weight(self, name: str) -> Tensor:
        if self.drops is None:
            return self._rounded(name).dequantize()
        first = self._checkpoint.weights[name]
        return softly_rounded(self._weights[name], self._roundings[name], first.scale, first.zero_point, first.bits)

    def _rounded(self, name: str) -> QuantizedWeight:
        first = self._checkpoint.weights[name]
        return rounded(self._weights[name], self._roundings[name].detach(), first.scale, first.zero_point, first.bits)

    def _quantizer(self, tensor: str) -> Quantizer:
        first = self._checkpoint.activations[tensor]
        assert isinstance(first, Uniform)
        return replace(first, scale=float(first.scale * self._scales[tensor].detach().exp()))


@dataclass(frozen=True)
class Fisher:
    """What was observed of the Fisher information at a block's output: G and D of the module's equations, float32 (k, n)."""

    gradients: Tensor
    changes: Tensor

    def low_rank(self, errors: Tensor) -> Tensor:
        """L_lr, float64 (B,), of the errors of some images, (B, n) and positive."""
        changes = self.changes.double()
        along = (errors @ self.gradients.T).double()
        return ((along @ torch.linalg.pinv(changes @ changes.T, hermitian=True)) * along).sum(1)

    def diagonal(self, errors: Tensor) -> Tensor:
        """L_diag, (B,), of the errors of some images, (B, n)."""
        return errors.square() @ self.gradients.mean(0)

    def parts(self, errors: Tensor) -> Tensor:
        """Both, means over the images: float64 (2,)."""
        return torch.stack([self.low_rank(errors).mean(), self.diagonal(errors).mean().double()])

    def joined(self, new: "Fisher") -> "Fisher":
        """With the rows of another observation."""
        return Fisher(torch.cat([self.gradients, new.gradients]), torch.cat([self.changes, new.changes]))


def observed(turn: Turn[RoundedBlock], wanted: Stream, num_classes: int) -> Fisher:
    """G and D of the block as it is quantized now, (1, n).

    Args:
        turn: the block.
        wanted: the float network's outputs.
        num_classes: of the network; 0 for a backbone, whose loss is half the squared relative error in place of the KL.
    """
    (read,) = turn.in_quantized
    gradients, changes = torch.zeros(()), torch.zeros(())
    for images in read.batches():
        with torch.no_grad():
            found = turn.step(read.read(images))
            changes = changes + _errors(found, turn.after.read(images), len(images)).sum(0)
        leaves = {name: value.requires_grad_() for name, value in _tensors(found).items()}
        reference = wanted.read(images)["output"]
        with torch.enable_grad():
            output = turn.rest(found | leaves)["output"]
            total = loss(reference / _TEMPERATURE, output / _TEMPERATURE, num_classes).sum()
        found_gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        gradients = gradients + _flat(dict(zip(leaves, found_gradients, strict=True)), len(images)).abs().sum(0)
    return Fisher(gradients[None] / read.count, changes[None] / read.count)


def learn_block(turn: Turn[RoundedBlock], wanted: Stream, num_classes: int, last: bool, iterations: int) -> None:
    """Changes a block's variables to make the loss of the module's equations small.

    Args:
        turn: the block.
        wanted: the float network's outputs.
        num_classes: of the network; 0 for a backbone.
        last: whether the network's output is the block's.
        iterations: steps.
    """
    variables, (in_quantized,) = turn.variables, turn.in_quantized
    learned = [*variables.roundings, *variables.scales]
    for variable in learned:
        variable.requires_grad_()
    roundings = {"params": variables.roundings, "lr": min(_ROUNDING_RATE / iterations, _LARGEST_RATE)}
    scales = {"params": variables.scales, "lr": _SCALE_RATE}
    optimizer = torch.optim.Adam([roundings, scales], betas=MOMENTA)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda done: (1 + math.cos(math.pi * done / iterations)) / 2])
    by_output = partial(output_error, rest=turn.rest, wanted=wanted, loss_of=partial(loss, num_classes=num_classes))
    fisher: Fisher | None = None
    first = torch.ones(2)
    variables.drops = turn.generator
    batches = shuffled(in_quantized, turn.generator)
    with torch.enable_grad():
        for iteration in range(iterations):
            images = next(batches)
            fresh = not last and iteration * RANK % iterations < RANK
            if fresh:
                new = observed(turn, wanted, num_classes)
                fisher = fisher.joined(new) if fisher else new
            found = turn.step(mixed(turn.in_float.read(images), in_quantized.read(images), turn.generator))
            if fisher is None:
                error = by_output(found, images)
            else:
                parts = fisher.parts(_errors(found, turn.after.read(images), len(images)))
                if fresh:
                    first = parts.detach().clamp(min=1e-30)
                error = (parts / first).sum()
            if (beta := beta_at(iteration / iterations)) is not None:
                error = error + _PENALTY * sum(penalty(some, beta) for some in variables.roundings)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            falling.step()
            turn.told((iteration + 1) / iterations)
    variables.drops = None
    for variable in learned:
        variable.requires_grad_(False)


def _errors(found: Values, target: Values, count: int) -> Tensor:
    """|y^ - y| of `count` images, (B, n), all tensors of a cut beside each other."""
    return (_flat(_tensors(found), count) - _flat(_tensors(target), count)).abs()


def _flat(tensors: dict[str, Tensor], count: int) -> Tensor:
    return torch.cat([tensors[name].reshape(count, -1) for name in sorted(tensors)], 1)


def _tensors(values: Values) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and value.is_floating_point()}


def _first_images(batches: Batches) -> Batches:
    """The first images alone, in one batch."""
    some: list[Tensor] = []
    for images, _ in batches:
        some.append(images)
        if sum(map(len, some)) >= _FITTED_ON:
            break
    return [(torch.cat(some)[:_FITTED_ON], None)]


def _device(graph: Graph) -> torch.device:
    return next(graph.module.parameters()).device
