"""Allocation problems for the tests, and the slow, obvious answer to them: every assignment tried, budgets and prices by definition.

Nothing here is shared with `vitq.allocation`: the definitions are written again, from docs/cli.md, in the plainest way.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest

from vitq.allocation import sizes
from vitq.artifacts import WIDTHS, CostTable, Layer, ModelSpec, Operand, Profile
from vitq.latency import LatencyTable

Assignment = dict[str, tuple[int | None, int]]
"""Layer name -> (weight bits, activation bits)."""


def make_layer(name: str, kind: str, parameters: int, macs: int, tensors: Sequence[str], channels: int = 1) -> Layer:
    """A linear that reads one tensor, or a matmul that reads two."""
    activations = [Operand(tensor=tensor, role="plain", shape=(1, 1)) for tensor in tensors]
    weight = [Operand(tensor=f"{name}.weight", role="weight", shape=(1, 1))] if len(tensors) == 1 else []
    return Layer(
        name=name,
        type=kind,
        op="linear" if weight else "matmul",
        block=name.rpartition(".")[0],
        parameters=parameters if weight else 0,
        channels=channels if weight else 0,
        macs=macs,
        operands=tuple(activations + weight),  # type: ignore[arg-type]
    )


def make_profile(layers: Sequence[Layer], table: CostTable, rest_bytes: int = 0) -> Profile:
    """A profile with the table as its only metric, `random`."""
    model = ModelSpec(architecture="none", num_classes=10, data_config={}, graph_digest="")
    return Profile(model=model, layers=tuple(layers), costs={"random": table}, rest_bytes=rest_bytes, made_from={"images": "here"})


def make_table(layers: Sequence[Layer], bits: Sequence[int], chance: random.Random, scale: float = 1.0, crossed: bool = True) -> CostTable:
    """Costs that fall with the width about as 4^-bits, with ties and zeros; `crossed` ones may be negative."""

    def row(name: str) -> tuple[float, ...]:
        level = chance.choice([0.0, 1.0, 1.0, chance.lognormvariate(0, 2)])
        costs = [level * 4.0**-width * chance.choice([1.0, chance.uniform(0.5, 2)]) for width in bits]
        return tuple(sorted((cost * scale for cost in costs), reverse=True))

    weighted = [layer.name for layer in layers if layer.has_weight]
    weight, activation = {name: row(name) for name in weighted}, {layer.name: row(layer.name) for layer in layers}
    cross = {
        name: tuple(tuple(chance.uniform(-0.3, 0.3) * math.sqrt(w * a) for a in activation[name]) for w in weight[name])
        for name in weighted
    }
    return CostTable.model_validate(
        {
            "unit": "nats",
            "bits": bits,
            "tied": {layer.name: row(layer.name) for layer in layers},
            "weight": weight,
            "activation": activation,
            "cross": cross if crossed else {},
        }
    )


def make_latencies(layers: Sequence[Layer], chance: random.Random) -> LatencyTable:
    """Milliseconds for every layer and pair of widths, narrower ones slower as often as not, and a rest that may be negative."""
    timings = [
        {"layers": [layer.name], "weight_bits": weight, "activation_bits": [activation], "ms": chance.randrange(10**6) / 10**6}
        for layer in layers
        for weight in ([[width] for width in WIDTHS] if layer.has_weight else [None])
        for activation in WIDTHS
    ]
    rest = chance.uniform(-1, 1)
    document = {"architecture": "none", "graph_digest": "", "batch": 1, "threads": 1, "rest_ms": round(rest, 6), "timings": timings}
    return LatencyTable.model_validate(document)


def deit(width: int = 768, blocks: int = 12, tokens: int = 197) -> list[Layer]:
    """The layers of a DeiT (B at width 768): per block qkv, qk, av, proj, fc1, fc2, and two fixed ones."""
    layers = [make_layer("patch_embed.proj", "patch_embed", 768 * width, 196 * 768 * width, ["image"], width)]
    for block in range(blocks):
        path, square = f"blocks.{block}", width * width
        for name, kind, factor, outputs in (
            ("attn.qkv", "qkv", 3, 3),
            ("attn.qk", "qk", 0, 0),
            ("attn.av", "av", 0, 0),
            ("attn.proj", "proj", 1, 1),
        ):
            if factor:
                layers.append(
                    make_layer(f"{path}.{name}", kind, factor * square, tokens * factor * square, [f"{path}.{name}.input"], outputs * width)
                )
            else:
                layers.append(
                    make_layer(f"{path}.{name}", kind, 0, tokens * tokens * width, [f"{path}.{name}.left", f"{path}.{name}.right"])
                )
        for name, outputs in (("fc1", 4), ("fc2", 1)):
            layers.append(
                make_layer(f"{path}.mlp.{name}", name, 4 * square, tokens * 4 * square, [f"{path}.{name}.input"], outputs * width)
            )
    return [*layers, make_layer("head", "head", 1000 * width, 1000 * width, ["norm"], 1000)]


@dataclass(frozen=True)
class Problem:
    """A profile small enough to try every assignment, and what to ask of it."""

    profile: Profile
    bits: tuple[int, ...]
    bits_apart: bool
    fixed: dict[str, tuple[int, int]]
    budgets: list[str] = field(default_factory=list)
    latencies: LatencyTable | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments for `allocate`."""
        fixed = [f"{name}={weight}/{activation}" for name, (weight, activation) in self.fixed.items()]
        return {"bits": self.bits, "bits_apart": self.bits_apart, "fixed": fixed, "latencies": self.latencies}

    def assignments(self) -> Iterator[Assignment]:
        """Every assignment that the rules allow, budgets aside."""
        layers = self.profile.layers
        pairs = []
        for layer in layers:
            imposed = {self.fixed[name][1] for name in sharing(layers, layer) if name in self.fixed}
            activations = sorted(imposed) or self.bits
            if not layer.has_weight:
                pairs.append([(None, activation) for activation in activations])
            elif layer.name in self.fixed:
                pairs.append([(self.fixed[layer.name][0], activation) for activation in activations])
            elif self.bits_apart:
                pairs.append([(weight, activation) for weight in self.bits for activation in activations])
            else:
                pairs.append([(activation, activation) for activation in activations])
        readers = [
            [i for i, layer in enumerate(layers) if tensor in tensors(layer)] for tensor in {t for layer in layers for t in tensors(layer)}
        ]
        for combination in itertools.product(*pairs):
            if all(len({combination[i][1] for i in group}) == 1 for group in readers):
                yield {layer.name: pair for layer, pair in zip(layers, combination, strict=True)}

    def cost(self, assignment: Assignment) -> float:
        """The sum of costs; a width that is not in the table costs what the next narrower one does."""
        table = self.profile.costs["random"]
        terms = []
        for layer in self.profile.layers:
            weight, activation = assignment[layer.name]
            column = max(i for i, width in enumerate(table.bits) if width <= activation)
            row = column if weight is None else max(i for i, width in enumerate(table.bits) if width <= weight)
            if not self.bits_apart and weight in (None, activation):
                terms.append(table.tied[layer.name][column])
            elif weight is None:
                terms.append(table.activation[layer.name][column])
            else:
                terms += [table.weight[layer.name][row], table.activation[layer.name][column]]
                terms.append(table.cross[layer.name][row][column] if table.cross else 0.0)
        return math.fsum(terms)

    def meets(self, assignment: Assignment, budgets: Sequence[str]) -> bool:
        """Whether all budgets hold, in exact arithmetic."""
        values = self.measure(assignment)
        for text in budgets:
            kind, _, value = text.partition("=")
            if kind == "size":
                held = values["size"] <= Fraction(value.removesuffix("B"))
            elif kind == "bops":
                held = values["bops"] <= Fraction(value)
            elif kind == "latency":
                held = self.latency(assignment) <= Fraction(value.removesuffix("ms"))
            elif kind == "like":
                uniform = self.measure(self.uniform(int(value)))
                held = values["size"] <= uniform["size"] and values["bops"] <= uniform["bops"]
            else:
                weights, _, activations = text.partition("/")
                held = values["weight"] <= Fraction(weights) and values["activation"] <= Fraction(activations or weights)
            if not held:
                return False
        return True

    def measure(self, assignment: Assignment) -> dict[str, Fraction]:
        """Average weight and activation bits (0 where nothing is averaged), bytes and BitOps."""
        size, bops = Fraction(self.profile.rest_bytes), Fraction(0)
        weight_sum = activation_sum = parameters = macs = Fraction(0)
        for layer in self.profile.layers:
            weight, activation = assignment[layer.name]
            bops += layer.macs * activation * (activation if weight is None else weight)
            size += 700 + (0 if weight is None else math.ceil(layer.parameters * weight / 8) + layer.channels * (4 if weight == 8 else 5))
            if layer.name not in self.fixed:
                macs, activation_sum = macs + layer.macs, activation_sum + layer.macs * activation
                parameters, weight_sum = parameters + layer.parameters, weight_sum + layer.parameters * (weight or 0)
        weight_average = weight_sum / parameters if parameters else Fraction(0)
        return {"weight": weight_average, "activation": activation_sum / macs if macs else Fraction(0), "size": size, "bops": bops}

    def latency(self, assignment: Assignment) -> Fraction:
        """Milliseconds: the rest and each layer's timing at its widths, looked up one by one."""
        assert self.latencies is not None
        found = Fraction(str(self.latencies.rest_ms))
        for name, (weight, activation) in assignment.items():
            (ms,) = [
                timing.ms
                for timing in self.latencies.timings
                if name in timing.layers
                and activation in timing.activation_bits
                and (weight is None or weight in (timing.weight_bits or ()))
            ]
            found += Fraction(f"{ms:.6f}")
        return found

    def uniform(self, width: int) -> Assignment:
        """All searched layers at one width, but for activations that a fixed layer shares."""
        result: Assignment = {}
        for layer in self.profile.layers:
            imposed = {self.fixed[name][1] for name in sharing(self.profile.layers, layer) if name in self.fixed}
            weight = self.fixed[layer.name][0] if layer.name in self.fixed else width
            result[layer.name] = (weight if layer.has_weight else None, min(imposed) if imposed else width)
        return result

    def best(self, budgets: Sequence[str]) -> float | None:
        """The least cost of any assignment within the budgets; None where there is none."""
        return min((self.cost(assignment) for assignment in self.assignments() if self.meets(assignment, budgets)), default=None)


def tensors(layer: Layer) -> set[str]:
    """The activation tensors that a layer reads."""
    return {operand.tensor for operand in layer.operands if operand.role != "weight"}


def sharing(layers: Sequence[Layer], start: Layer) -> set[str]:
    """The names of all layers that are joined to one by shared tensors, itself included."""
    joined = {start.name}
    while True:
        read = {tensor for layer in layers if layer.name in joined for tensor in tensors(layer)}
        grown = {layer.name for layer in layers if tensors(layer) & read}
        if grown == joined:
            return joined
        joined = grown


@pytest.fixture(scope="module", autouse=True)
def plain_sizes() -> Iterator[None]:
    """Sizes by a rule that is easy to work out by hand; the measured constants have tests of their own (test_size.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "NODE_BYTES", dict.fromkeys(sizes.NODE_BYTES, 700))
        patch.setattr(sizes, "UNPACK_BYTES", dict.fromkeys(sizes.UNPACK_BYTES, 0))
        patch.setattr(sizes, "NAME_BYTES", 0)
        patch.setattr(sizes, "CLIP_BYTES", 0)
        patch.setattr(sizes, "PARTS", {})
        patch.setattr(sizes, "_container", lambda parameters, bits: bits)
        yield
