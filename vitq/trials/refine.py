"""LampQ's iterative update: one unit rises by a width, another falls, and the pair is kept where the measured loss falls.

From LampQ (AAAI 2026, section on error-based bit update). With E_l(B) the relative error of layer l's output at width B, both operands
quantized and its input from the float network,

    gain_l = E_l(B_l) - E_l(B_l + 1)          the unit with the largest rises
    loss_l = E_l(B_l - 1) - E_l(B_l)          the unit with the smallest falls

Differs from the paper: its sentence on gains and losses has the indices the other way round, and its words are followed; every budget
has to hold after a pair, not the unweighted mean of the bits; layers that read one tensor move together, by the sum of their errors; the
objective is KL to the float network, since top-1 on a few hundred images is too coarse; and a rejected pair is followed by the next best
one, `patience` of them, where the paper stops at the first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitq.allocation.moves import Bits, Moves, Unit
from vitq.artifacts import Layer
from vitq.fitting import fit_operand, fit_weights, roles
from vitq.graph import Graph, run
from vitq.graph.run import Intercept
from vitq.ranges import Batches, Histogram
from vitq.trials.audit import Loss

Errors = Mapping[str, Mapping[int, float]]
"""E_l(B) by layer name and width."""


@dataclass(frozen=True)
class Step:
    """One pair that was tried: names of the unit that rose and of the one that fell, the loss it measured, and whether it was kept."""

    up: str
    down: str
    loss: float
    kept: bool


@dataclass(frozen=True)
class Refinement:
    """The plan's bits in the end, its measured loss and that of the plan it started from, and every step."""

    bits: Bits
    loss: float
    start: float
    steps: tuple[Step, ...]


MOST_STEPS = 40
"""How many pairs are tried, unless told otherwise."""


def refine(start: Bits, moves: Moves, errors: Errors, measure: Loss, patience: int = 4, most_steps: int = MOST_STEPS) -> Refinement:
    """Updates a plan as long as that lowers its measured loss.

    Args:
        start: the plan; it meets the budgets.
        moves: what moves together, and the budgets.
        errors: of every layer at every candidate width (`layer_errors`).
        measure: the real loss of a plan.
        patience: how many pairs in a row may fail.
        most_steps: how many pairs are tried in all.

    Returns:
        A plan that measures no worse than `start` and meets every budget.
    """
    bits, best = start, measure(start)
    first, steps, failed = best, [], 0
    tried: set[tuple[tuple[str, tuple[int | None, int]], ...]] = {_key(start)}
    while failed < patience and len(steps) < most_steps:
        found = next(((up, down, new) for up, down, new in _pairs(bits, moves, errors) if _key(new) not in tried), None)
        if found is None:
            break
        up, down, new = found
        tried.add(_key(new))
        loss = measure(new)
        steps.append(Step(up.name, down.name, loss, loss < best))
        failed = 0 if loss < best else failed + 1
        if loss < best:
            bits, best = new, loss
    return Refinement(bits, best, first, tuple(steps))


def layer_errors(
    graph: Graph, histograms: Mapping[str, Histogram], covariances: Mapping[str, Tensor], batches: Batches, widths: Sequence[int]
) -> dict[str, dict[int, float]]:
    """E_l(B) of every layer at every width, with the quantizers that calibration uses.

    Args:
        graph: the folded graph.
        histograms: of its activations, by `Operand.tensor`.
        covariances: of its linears' inputs, by layer name.
        batches: gone through once; a few dozen images tell enough.
        widths: the candidate widths.
    """
    errors = {layer.name: dict.fromkeys(widths, 0.0) for layer in graph.layers}
    powers = dict.fromkeys(errors, 0.0)
    role = roles(graph.layers)
    quantizers = {tensor: {width: fit_operand(found, width, role[tensor]) for width in widths} for tensor, found in histograms.items()}

    def watch(layer: Layer) -> Intercept:
        fitted = fit_weights(graph, covariances, layer.name, widths) if layer.has_weight else []
        weights = {weight.bits: weight.dequantize() for weight in fitted}

        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            output = compute(*arguments)
            powers[layer.name] += float(output.double().square().sum())
            for width in widths:
                read = list(arguments)
                for index, operand in enumerate(layer.activations):
                    read[index] = quantizers[operand.tensor][width].quantize_dequantize(arguments[index])
                if layer.has_weight:
                    read[1] = weights[width]
                errors[layer.name][width] += float((compute(*read) - output).double().square().sum())
            return output

        return intercept

    intercepts = {graph.nodes[layer.name]: watch(layer) for layer in graph.layers}
    for images, _ in batches:
        with torch.no_grad():
            run(graph.module, images, intercepts)
    return {name: {width: error / max(powers[name], 1e-30) for width, error in found.items()} for name, found in errors.items()}


def _pairs(bits: Bits, moves: Moves, errors: Errors) -> list[tuple[Unit, Unit, Bits]]:
    """Every pair that keeps to the budgets and leads somewhere, by gain minus loss, the best first; ties by name."""
    rising = {unit: new for unit in moves.units if (new := moves.moved(bits, unit, 1)) is not None}
    falling = {unit: new for unit in moves.units if (new := moves.moved(bits, unit, -1)) is not None}
    gains = {unit: _error(bits, unit, errors) - _error(new, unit, errors) for unit, new in rising.items()}
    losses = {unit: _error(new, unit, errors) - _error(bits, unit, errors) for unit, new in falling.items()}
    ordered = sorted(
        ((up, down) for up in rising for down in falling if up != down),
        key=lambda pair: (losses[pair[1]] - gains[pair[0]], pair[0].name, pair[1].name),
    )
    found = []
    for up, down in ordered:
        new = moves.moved(rising[up], down, -1)
        if new is not None and moves.meets(new):
            found.append((up, down, new))
    return found


def _error(bits: Bits, unit: Unit, errors: Errors) -> float:
    """The sum of a unit's layer errors; a layer whose two widths differ counts at the narrower one."""
    names = dict.fromkeys((*unit.weights, *unit.activations))
    return sum(errors[name][min(width for width in bits[name] if width is not None)] for name in names)


def _key(bits: Bits) -> tuple[tuple[str, tuple[int | None, int]], ...]:
    return tuple(sorted(bits.items()))
