"""Two metrics that know nothing of the model's weights or images, to compare the others with.

`uniform` prices a layer by its share of the weights and of the multiplications, times 4^-b, which is convex in the bits: at an average of
weights and activations that a uniform plan meets exactly, no other plan is cheaper, so the allocator has no preference. `random`
multiplies each layer's price by a number from 1/10 to 10 that only the seed and the layer's name decide.
"""

import hashlib

from vitq.artifacts import CostTable
from vitq.importance.costs import by_width
from vitq.importance.subject import Subject


def uniform(subject: Subject) -> CostTable:
    """Prices every layer by its size alone; costs that rank ("relative")."""
    weights, inputs = _shares(subject)
    return by_width(
        subject, {name: weights[name] + inputs[name] for name in weights}, {n: weights[n] / (weights[n] + inputs[n]) for n in weights}
    )


def random(subject: Subject) -> CostTable:
    """Prices every layer by its size and chance; costs that rank ("relative")."""
    weights, inputs = _shares(subject)
    importance = {name: (weights[name] + inputs[name]) * 10 ** (2 * _chance(subject.seed, name) - 1) for name in weights}
    return by_width(subject, importance, {n: weights[n] / (weights[n] + inputs[n]) for n in weights})


def _shares(subject: Subject) -> tuple[dict[str, float], dict[str, float]]:
    """Each layer's part of all weights and of all multiply-accumulates."""
    layers = subject.graph.layers
    parameters, macs = (sum(layer.parameters for layer in layers), sum(layer.macs for layer in layers))
    return {layer.name: layer.parameters / max(parameters, 1) for layer in layers}, {layer.name: layer.macs / macs for layer in layers}


def _chance(seed: int, name: str) -> float:
    """A number in [0, 1), the same everywhere; a hash, so that no layer's depends on the order of the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big") / 2**64
