"""The plan: the bits of every layer; and the staircase, the best plans at many budgets."""

from typing import Any, Literal

from vitq.artifacts.layers import Bits, Layer, ModelSpec, Value
from vitq.errors import InputError


class LayerBits(Value):
    """The widths of one layer in a plan; `weight_bits` is null for a matmul, whose two inputs share `activation_bits`."""

    name: str
    type: str
    weight_bits: Bits | None
    activation_bits: Bits


class BitPlan(Value):
    """The chosen widths of every layer, in any order (`vitq allocate`: by name). `summary` is recomputed on use, never trusted."""

    format: Literal["vitq-plan/1"] = "vitq-plan/1"
    model: ModelSpec
    layers: tuple[LayerBits, ...]
    fixed: tuple[str, ...] = ()
    summary: dict[str, Any] = {}
    made_from: dict[str, Any] = {}

    def check(self, layers: tuple[Layer, ...]) -> None:
        """Checks that the plan gives bits to exactly these layers and agrees on shared tensors.

        Raises:
            InputError: an unknown or missing layer, weight bits where there is no weight or none where there is one, or consumers
                of one tensor with different activation bits.
        """
        known = {layer.name: layer for layer in layers}
        given = [entry.name for entry in self.layers]
        if unknown := [name for name in given if name not in known]:
            raise InputError(f"the plan names layer {unknown[0]!r}, which the model does not have; `vitq show MODEL` lists its layers")
        if len(set(given)) != len(given):
            raise InputError(f"the plan names layer {next(n for n in given if given.count(n) > 1)!r} twice; keep one entry")
        if missing := [name for name in known if name not in set(given)]:
            raise InputError(f"the plan has no entry for layer {missing[0]!r}; every layer needs one (`vitq allocate` writes them all)")
        first_reader: dict[str, LayerBits] = {}
        for entry in self.layers:
            layer = known[entry.name]
            if layer.has_weight and entry.weight_bits is None:
                raise InputError(f"the plan gives layer {entry.name!r} no weight_bits; it has a weight: give 2 to 8")
            if not layer.has_weight and entry.weight_bits is not None:
                raise InputError(f"the plan gives matmul {entry.name!r} weight_bits {entry.weight_bits}; a matmul has no weight: give null")
            for operand in layer.activations:
                other = first_reader.setdefault(operand.tensor, entry)
                if other.activation_bits != entry.activation_bits:
                    raise InputError(
                        f"layers {other.name!r} and {entry.name!r} read the same tensor but have activation_bits "
                        f"{other.activation_bits} and {entry.activation_bits}; give both the same"
                    )

    @property
    def bits(self) -> dict[str, LayerBits]:
        """The entries by layer name."""
        return {entry.name: entry for entry in self.layers}


class Step(Value):
    """One plan of a staircase: its `budget` in average bits, what it comes to, and its (weight, activation) bits by layer.

    `bound` and `gap` are its proof; None for equal bits everywhere, which nobody searched for.
    """

    budget: float
    average_weight_bits: float | None
    average_activation_bits: float | None
    size_bytes: int
    bops: int
    objective: float
    bound: float | None = None
    gap: float | None = None
    layers: dict[str, tuple[Bits | None, Bits]]


class Staircase(Value):
    """The best plans at many budgets, as `vitq allocate --pareto` writes them, beside equal bits everywhere."""

    format: Literal["vitq-pareto/1"] = "vitq-pareto/1"
    metric: str
    objective: str
    unit: str
    bits_apart: bool
    paper_parity: bool = False
    plans: tuple[Step, ...]
    uniform: tuple[Step, ...]
