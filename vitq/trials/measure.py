"""What a plan costs for real: calibrated by recipe `fast`, run on images, compared with the float network."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitq.artifacts import BitPlan
from vitq.calibration.fast import fit_fast
from vitq.fitting import observe
from vitq.gradients import loss
from vitq.graph import Graph
from vitq.models import LoadedModel
from vitq.ranges import Batches, Histogram
from vitq.rewrites import prepare


@dataclass(frozen=True)
class Trials:
    """Measures plans of one model. Fold, histograms, covariances and the float outputs serve all plans; a plan is measured once.

    `calibration` fits the quantizers and `held_out` measures them; both are gone through again for each plan.
    """

    graph: Graph
    histograms: Mapping[str, Histogram]
    covariances: Mapping[str, Tensor]
    calibration: Batches
    held_out: Batches
    num_classes: int
    _expected: list[Tensor] = field(default_factory=list)
    _losses: dict[tuple, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: LoadedModel, calibration: Batches, held_out: Batches, device: str = "cpu") -> "Trials":
        """Captures and folds the model. Raises InputError where it cannot be captured."""
        graph, spec = prepare(model, device)
        return cls(*observe(graph, calibration), calibration, held_out, spec.num_classes)

    def losses(self, plan: BitPlan) -> list[float]:
        """KL(float || quantized) in nats for each held-out image; of a backbone, half the squared relative error."""
        if plan.layers not in self._losses:
            plan.check(self.graph.layers)
            module = fit_fast(self.graph, self.histograms, plan, self.calibration).quantized_module()
            found = []
            with torch.no_grad():
                for index, (images, _) in enumerate(self.held_out):
                    if index == len(self._expected):
                        self._expected.append(self.graph.module(images))
                    found.append(loss(self._expected[index], module(images), self.num_classes))
            self._losses[plan.layers] = torch.cat(found).tolist()
        return self._losses[plan.layers]
