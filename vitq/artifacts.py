"""The values that travel between the stages, and their JSON: layers, cost tables, the profile, the plan.

Nothing here needs torch, so a profile can be read and a plan be made anywhere. What is read from a file is validated once, here,
completely; the stages trust it. `made_from` says what made an artifact (sources, digests, versions): it is stored, never compared.
"""

import json
import math
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError

from vitq.choices import FisherLabels, LrpAggregate, LrpRules, LrpTarget, SensitivityLoss
from vitq.errors import InputError, UsageError
from vitq.whole import refusal, unfinished

Role = Literal["weight", "post_layernorm", "post_softmax", "post_gelu", "image", "plain"]
Operation = Literal["linear", "convolution", "matmul"]
Bits = Literal[2, 3, 4, 5, 6, 7, 8]

WIDTHS: tuple[Bits, ...] = (2, 3, 4, 5, 6, 7, 8)
"""The bit-widths that a layer may get."""

Count = Annotated[int, Field(ge=0, le=2**53)]


class Value(BaseModel):
    """An immutable, closed record: unknown fields and non-finite numbers are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Operand(Value):
    """One tensor that enters a layer.

    `tensor` names the tensor in the graph: operands with the same name are one tensor and share one quantizer. `shape` is that of a
    batch of one image (a leading axis may count windows as well).
    """

    tensor: str
    role: Role
    shape: tuple[int, ...]


class Layer(Value):
    """One multiplying op of the captured graph that may be quantized.

    `operands` are (input, weight) of a linear or convolution and (left, right) of a matmul. `parameters` counts weight elements
    without the bias, 0 for a matmul; `macs` is multiply-accumulates per image; `channels` the number of output channels, each
    with its own weight scale, 0 for a matmul. `block` is the name of the block that holds the layer.
    """

    name: str
    type: str
    op: Operation
    block: str
    parameters: Count
    channels: Count
    macs: Count
    operands: tuple[Operand, Operand]

    @property
    def has_weight(self) -> bool:
        """Whether the second operand is a weight."""
        return self.op != "matmul"

    @property
    def activations(self) -> tuple[Operand, ...]:
        """The operands that are activations: one of a linear or convolution, two of a matmul."""
        return self.operands[:1] if self.has_weight else self.operands


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


class ModelSpec(Value):
    """All that is needed to build the architecture again, without its weights, and to feed it.

    `arguments` go to `timm.create_model` beside the architecture's name. `data_config` is timm's (input_size, mean, std,
    interpolation, crop_pct, crop_mode). `graph_digest` is the digest of the captured graph: ops, layer names and shapes.
    """

    architecture: str
    arguments: dict[str, Any] = {}
    num_classes: int = Field(ge=0)
    data_config: dict[str, Any]
    label_names: tuple[str, ...] = ()
    graph_digest: str


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


T = TypeVar("T", bound=Value)


def dump(artifact: Value) -> str:
    """The artifact as JSON text, byte-identical for equal values."""
    return json.dumps(artifact.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def save(artifact: Value, path: str | Path, force: bool = False) -> None:
    """Writes the artifact as JSON; the file appears whole or not at all.

    Raises:
        UsageError: the file exists and `force` is not set.
    """
    refuse_existing(path, force)
    write_whole(path, lambda temporary: temporary.write_text(dump(artifact), encoding="utf-8"))


def load_profile(path: str | Path) -> Profile:
    """Reads and validates a profile; raises InputError for a missing, damaged or foreign file."""
    return load_artifact(path, Profile, "vitq profile MODEL --images PATH")


def load_plan(path: str | Path) -> BitPlan:
    """Reads and validates a plan; raises InputError for a missing, damaged or foreign file."""
    return load_artifact(path, BitPlan, "vitq allocate --budget 4.0")


def load_staircase(path: str | Path) -> Staircase:
    """Reads and validates a staircase; raises InputError for a missing, damaged or foreign file."""
    return load_artifact(path, Staircase, "vitq allocate --pareto FILE")


def refuse_existing(path: str | Path, force: bool) -> None:
    """Raises UsageError where `path` exists and `force` is not set, and where it is no file that could be replaced."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give -o a file to write")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is a device or a pipe, which is not replaced; give -o a file to write")
    if path.exists() and not force:
        raise UsageError(f"{path} exists already; give --force to replace it or -o to write elsewhere")


def refuse_missing(path: str | Path, made_by: str) -> None:
    """Raises InputError where there is no file `path`, which the command `made_by` writes."""
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; give the file that `{made_by}` writes")
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist; `{made_by}` writes it")


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Has `write` fill a temporary file beside `path`, then renames it, so that no half-written file is ever seen.

    Raises:
        UsageError: the path is a folder, a device or a pipe.
        InputError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        refuse_existing(path, force=True)
        with unfinished(path) as temporary:
            write(temporary)
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def cannot_write(path: str | Path, error: Exception, otherwise: str = "choose another place with -o or --run-dir") -> InputError:
    """The fault of a file that cannot be written: what the system refused, and what to do about it."""
    reason, remedy = refusal(error) or ((getattr(error, "strerror", None) or str(error)), "")
    return InputError(f"cannot write {path}: {reason}; {remedy}{', or ' if remedy else ''}{otherwise}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_artifact(path: str | Path, kind: type[T], made_by: str) -> T:
    """Reads and validates an artifact that the command `made_by` writes; raises InputError for a missing, damaged or foreign file."""
    expected = kind.model_fields["format"].default
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; `{made_by}` writes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; `{made_by}` writes a new one") from None
    if _depth(data) > 100:
        raise InputError(f"{path} is nested deeper than 100 levels; `{made_by}` writes a new one")
    if not isinstance(data, dict) or data.get("format") != expected:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path} is not a {expected} file (found {reprlib.repr(found)}); `{made_by}` writes one")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(data, first["loc"])
        raise InputError(
            f"{path}: {place}{first['msg']} (got {reprlib.repr(first['input'])}); correct it or write a new one with `{made_by}`"
        ) from None


def _place(data: Any, location: tuple[int | str, ...]) -> str:
    """Where in the document a fault is, with the layer's name where an entry of a list has one."""
    words = []
    for step in location:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            data = None
        name = data.get("name") if isinstance(data, dict) else None
        words.append(f"{step} ({name})" if isinstance(name, str) else str(step))
    return ".".join(words) + ": " if words else ""


def _depth(data: Any) -> int:
    """How deep the JSON value is nested; what is deeper than some hundred levels could be read but not written again."""
    depth, level = 0, [data]
    while level:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())]
    return depth


def _finite(text: str) -> float:
    """A JSON number; NaN, Infinity and what is too large for a float (1e999) are none."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number
