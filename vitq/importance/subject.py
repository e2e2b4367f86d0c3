"""What a metric is given: the folded graph, the images, the widths, and how it is to go about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from vitq.artifacts import MetricOptions
from vitq.gradients import Probe, pair_for, probe_for
from vitq.graph import Graph
from vitq.ranges import Batches, Histogram


@dataclass(frozen=True)
class Subject:
    """What is priced.

    `graph` is the folded graph (`ranges.fold`), whose layers and values are those that calibration starts from; `histograms` are those
    of its activations, by `Operand.tensor`; `batches` the images, with labels where the source has them; `bits` the widths, ascending;
    `num_classes` is 0 for a backbone. A metric that takes long appends its results to `journal` as they come and goes on from there.
    One that works long on a batch tells `progress` how many images are done, parts of one too.
    `covariances` are those of linears' inputs, by layer name, with which `calibrate` rounds weights; without one, to nearest.
    """

    graph: Graph
    histograms: Mapping[str, Histogram]
    batches: Batches
    bits: tuple[int, ...]
    num_classes: int
    seed: int = 0
    options: MetricOptions = field(default_factory=MetricOptions)
    journal: Path | None = None
    covariances: Mapping[str, Tensor] = field(default_factory=dict)
    progress: Callable[[float], None] = field(default=lambda _: None, compare=False, repr=False)

    @property
    def probe(self) -> Probe:
        """The random scalar of the output whose gradients know the loss's second derivative."""
        return probe_for(self.num_classes)

    @property
    def pair(self) -> Probe:
        """A pair of such scalars, whose mean has less noise."""
        return pair_for(self.num_classes)
