"""What a plan costs for real: calibrated by recipe `fast`, run on images, compared with the float network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitq.artifacts import BitPlan
from vitq.calibration.fast import fit_fast
from vitq.fitting import input_covariances
from vitq.gradients import loss
from vitq.graph import Graph
from vitq.models import LoadedModel
from vitq.ranges import Batches, Histogram, fold
from vitq.rewrites import prepare


@dataclass(frozen=True)
class Trials:
    """Measures plans of one model. The LayerNorm fold, histograms and covariances serve all plans; a plan's loss is measured once.

    `calibration` fits the quantizers and `held_out` measures them; both are gone through again for each plan.
    """

    graph: Graph
    histograms: Mapping[str, Histogram]
    covariances: Mapping[str, Tensor]
    calibration: Batches
    held_out: Batches
    num_classes: int
    _losses: dict[tuple, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LoadedModel, calibration: Batches, held_out: Batches, device: str = "cpu") -> "Trials":
        """Captures and folds the model. Raises InputError where it cannot be captured."""
        graph, spec = prepare(model, device)
        folded, histograms = fold(graph, calibration)
        return cls(folded, histograms, input_covariances(folded, calibration), calibration, held_out, spec.num_classes)

    def loss(self, plan: BitPlan) -> float:
        """Mean KL(float || quantized) in nats an image; of a backbone, half the mean squared relative error."""
        if plan.layers not in self._losses:
            plan.check(self.graph.layers)
            module = fit_fast(self.graph, self.histograms, self.covariances, plan, self.calibration).quantized_module()
            total, count = 0.0, 0
            with torch.no_grad():
                for images, _ in self.held_out:
                    total += float(loss(self.graph.module(images), module(images), self.num_classes).sum())
                    count += len(images)
            self._losses[plan.layers] = total / max(count, 1)
        return self._losses[plan.layers]
