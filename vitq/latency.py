"""The table of measured latencies that `vitq bench --layers` writes and `vitq allocate --budget latency=4.0ms` reads.

    predicted latency of a plan  =  rest_ms + the sum over its layers of what the layer takes at its widths

Needs no torch, as the other artifacts. `made_from` says on what machine and with which versions it was measured.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vitq.artifacts import WIDTHS, Bits, Layer, Value, load_artifact
from vitq.errors import InputError

MADE_BY = "vitq bench --layers"
Milliseconds = Annotated[float, Field(ge=0, le=1e9)]


class Timing(Value):
    """Each of `layers` takes `ms` at any of these widths; `weight_bits` is null for matmuls."""

    layers: tuple[str, ...]
    weight_bits: Annotated[tuple[Bits, ...], Field(min_length=1)] | None
    activation_bits: tuple[Bits, ...]
    ms: Milliseconds


class LatencyTable(Value):
    """Milliseconds of every layer at every width, for runs of `batch` images on `threads` threads.

    `rest_ms` is everything that is no layer, so that it makes the sum right for the whole model that was measured; it may be negative.
    `graph_digest` is that of the model's graph, as in its profile.
    """

    format: Literal["vitq-latency/1"] = "vitq-latency/1"
    architecture: str
    graph_digest: str
    batch: int = Field(ge=1)
    threads: int = Field(ge=1)
    rest_ms: float = Field(ge=-1e9, le=1e9)
    timings: tuple[Timing, ...]
    made_from: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> "LatencyTable":
        found: dict[str, list[tuple[int | None, int]]] = {}
        for name, widths, _ in self._entries():
            found.setdefault(name, []).append(widths)
        for name, pairs in found.items():
            weights: tuple[int | None, ...] = (None,) if (None, pairs[0][1]) in pairs else WIDTHS
            expected = {(weight, activation) for weight in weights for activation in WIDTHS}
            if len(pairs) != len(expected) or set(pairs) != expected:
                raise ValueError(f"the timings of layer {name} do not cover the widths {WIDTHS[0]} to {WIDTHS[-1]}, each once")
        return self

    def check(self, layers: tuple[Layer, ...], graph_digest: str, again: str = MADE_BY) -> None:
        """Raises InputError, which names the command `again`, where the table is not of the graph with this digest and these layers."""
        if self.graph_digest != graph_digest:
            raise InputError(f"the latencies are those of another model ({self.architecture}); run `{again}` again")
        timed = {(name, widths[0] is None) for name, widths, _ in self._entries()}
        if unlike := {(layer.name, not layer.has_weight) for layer in layers} ^ timed:
            raise InputError(f"the latencies do not fit layer {min(unlike)[0]!r} of the model; run `{again}` again")

    def nanoseconds(self, layer: Layer, weight_bits: int | None, activation_bits: int) -> int:
        """What a layer takes at its widths, in whole nanoseconds; of a layer that `check` has seen."""
        return self._nanoseconds[layer.name, weight_bits, activation_bits]

    @property
    def rest_nanoseconds(self) -> int:
        """`rest_ms` in whole nanoseconds."""
        return round(self.rest_ms * 10**6)

    @cached_property
    def _nanoseconds(self) -> dict[tuple[str, int | None, int], int]:
        return {(name, *widths): round(ms * 10**6) for name, widths, ms in self._entries()}

    def _entries(self) -> Iterator[tuple[str, tuple[int | None, int], float]]:
        for timing in self.timings:
            for weight in timing.weight_bits or (None,):
                for activation in timing.activation_bits:
                    yield from ((name, (weight, activation), timing.ms) for name in timing.layers)


def load_latency_table(path: Path) -> LatencyTable:
    """Reads and validates a table; raises InputError for a missing, damaged or foreign file."""
    return load_artifact(path, LatencyTable, MADE_BY)
