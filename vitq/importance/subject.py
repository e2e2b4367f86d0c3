"""What a metric is given: the folded graph, the images, the widths, and how it is to go about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vitq.gradients import Probe, probe_for
from vitq.graph import Graph
from vitq.ranges import Batches, Histogram


@dataclass(frozen=True)
class MetricOptions:
    """The choices that single metrics offer; each field names the metric that reads it.

    `lrp_*`: rules of propagation, the class that is explained, and how a layer's relevance becomes one number. `sensitivity_*`: the loss
    that is compared, and what the other layers run at ("fp32", "w8a8", or "uniform 4"). `fisher`: labels sampled from the model
    ("true") or the images' own ("empirical").
    """

    lrp_rules: Literal["chefer", "epsilon", "gamma", "attnlrp"] = "chefer"
    lrp_target: Literal["pred", "label"] = "pred"
    lrp_aggregate: Literal["abs", "positive", "signed"] = "abs"
    sensitivity_loss: Literal["kl", "cross-entropy", "top1"] = "kl"
    sensitivity_baseline: str = "w8a8"
    fisher: Literal["true", "empirical"] = "true"


@dataclass(frozen=True)
class Subject:
    """What is priced.

    `graph` is the folded graph (`ranges.fold`), whose layers and values are those that calibration starts from; `histograms` are those
    of its activations, by `Operand.tensor`; `batches` the images, with labels where the source has them; `bits` the widths, ascending;
    `num_classes` is 0 for a backbone. A metric that takes long appends its results to `journal` as they come and goes on from there.
    """

    graph: Graph
    histograms: Mapping[str, Histogram]
    batches: Batches
    bits: tuple[int, ...]
    num_classes: int
    seed: int = 0
    options: MetricOptions = field(default_factory=MetricOptions)
    journal: Path | None = None

    @property
    def probe(self) -> Probe:
        """The random scalar of the output whose gradients know the loss's second derivative."""
        return probe_for(self.num_classes)
