"""The profile: what the bits of each layer cost, by the tables of one metric or more."""

from typing import Any, Literal

from pydantic import model_validator

from vitq.artifacts.layers import Bits, Count, Layer, ModelSpec, Value
from vitq.choices import FisherLabels, LrpAggregate, LrpRules, LrpTarget, SensitivityLoss


class PairCost(Value):
    """What two layers cost together beyond the sum of both, with tied widths: a row a width of `first`, a column a width of `second`."""

    first: str
    second: str
    costs: tuple[tuple[float, ...], ...]


class CostTable(Value):
    """What a metric tells the allocator: the predicted increase of the loss, per layer and width.

    Each entry lists one cost a width of `bits`, in that order, and never increases with the width. `tied` prices a layer whose
    operands all have the width; `weight` and `activation` price its weight or its inputs alone; `cross`, where given, is what a
    (weight width, activation width) pair costs beyond the two, a row a weight width. `unit` is "nats" (per image: promises to
    predict the KL divergence), "accuracy" (points) or "relative" (only ranks). `importance`, of a metric that has one number a layer, is
    that number; its costs are then made of it and the width. `pairs` are terms between layers, for the objective `pairwise`. `halves`,
    where given, are the same costs from either half of the images alone: a plan chosen by one can be priced by the other.
    """

    unit: Literal["nats", "accuracy", "relative"]
    bits: tuple[Bits, ...]
    tied: dict[str, tuple[float, ...]]
    weight: dict[str, tuple[float, ...]]
    activation: dict[str, tuple[float, ...]]
    cross: dict[str, tuple[tuple[float, ...], ...]] = {}
    importance: dict[str, float] = {}
    pairs: tuple[PairCost, ...] = ()
    halves: tuple["CostTable", ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> "CostTable":
        if sorted(set(self.bits)) != list(self.bits) or not self.bits:
            raise ValueError(f"bits must be distinct and ascending, got {list(self.bits)}")
        for kind, table in (("tied", self.tied), ("weight", self.weight), ("activation", self.activation)):
            for layer, costs in table.items():
                if len(costs) != len(self.bits):
                    raise ValueError(f"{kind} costs of layer {layer}: {len(costs)} values for {len(self.bits)} widths")
        for half in self.halves:
            if half.bits != self.bits or any(
                set(getattr(half, kind)) != set(getattr(self, kind)) for kind in ("tied", "weight", "activation")
            ):
                raise ValueError("a half of the images has other layers or widths than the whole")
        for layer, rows in self.cross.items():
            if [len(row) for row in rows] != [len(self.bits)] * len(self.bits):
                raise ValueError(f"cross costs of layer {layer}: they are no table of {len(self.bits)} x {len(self.bits)} widths")
        for pair in self.pairs:
            if [len(row) for row in pair.costs] != [len(self.bits)] * len(self.bits):
                raise ValueError(f"pair {pair.first}, {pair.second}: no table of {len(self.bits)} x {len(self.bits)} widths")
        return self


class MetricOptions(Value):
    """The choices that single metrics offer.

    `lrp_*`: rules of propagation, the class that is explained, and how a layer's relevance becomes one number. `sensitivity_*`: the loss
    that is compared, and what the other layers run at ("fp32", "w8a8", or "uniform 4"). `fisher`, of lampq: labels sampled from the model
    ("true") or the images' own ("empirical"). `pairs`, of output-fisher: terms between layers too, for the objective `pairwise`.
    """

    lrp_rules: LrpRules = "chefer"
    lrp_target: LrpTarget = "pred"
    lrp_aggregate: LrpAggregate = "abs"
    sensitivity_loss: SensitivityLoss = "kl"
    sensitivity_baseline: str = "fp32"
    fisher: FisherLabels = "true"
    pairs: bool = False


class Profile(Value):
    """The layers of a model and what their bits cost, one table a metric; the first metric is the allocator's default.

    `rest_bytes` is the predicted size of everything in an exported file that is not a layer's own: float tensors and graph.
    """

    format: Literal["vitq-profile/1"] = "vitq-profile/1"
    model: ModelSpec
    layers: tuple[Layer, ...]
    costs: dict[str, CostTable]
    rest_bytes: Count
    made_from: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Profile":
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise ValueError("two layers have the same name")
        weighted = {layer.name for layer in self.layers if layer.has_weight}
        for metric, table in self.costs.items():
            expected = (("tied", table.tied, set(names)), ("weight", table.weight, weighted), ("activation", table.activation, set(names)))
            for kind, costs, layers in expected:
                if set(costs) != layers:
                    raise ValueError(f"metric {metric}: the {kind} costs do not cover the layers: {sorted(set(costs) ^ layers)[:3]}")
            if not set(table.cross) <= weighted:
                raise ValueError(
                    f"metric {metric}: cross costs of what is no layer with a weight: {sorted(set(table.cross) - weighted)[:3]}"
                )
            if table.importance and set(table.importance) != set(names):
                raise ValueError(f"metric {metric}: the importance does not cover the layers")
            if unknown := {name for pair in table.pairs for name in (pair.first, pair.second)} - set(names):
                raise ValueError(f"metric {metric}: a pair names what is no layer: {sorted(unknown)[:3]}")
        return self
