"""One step of fine-tuning after the other: the whole network's variables, AdamW on them, and their moving averages."""

import math
import time
from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor

from vitq.calibration.variables import BlockVariables
from vitq.checkpoint import Checkpoint
from vitq.errors import InputError
from vitq.finetune.processes import Processes
from vitq.finetune.training import Training
from vitq.graph import run
from vitq.images import Batch
from vitq.models import LoadedModel

RATES = {"gain": 0.003, "bias": 0.001, "range": 0.005, "zero_point": 0.02, "norm_gain": 0.0015, "norm_bias": 0.0015}
"""AdamW's rate of each kind of variable but weights, in its own unit (calibration/variables.py).

Lower than where a block learns alone, since a batch's loss says less of each variable: biases at 0.01 take the KL of the demo's model at
3/3 from 0.059 to 0.078 within thirty steps, and at 0.001 to 0.055 within sixty.
"""

_MOMENTA = (0.9, 0.999)
_CONFIDENT = 0.005  # in steps: weights farther than that from where rounding changes stand still in the end, as in OFQ's code


class Learner:
    """The variables of a checkpoint, and what changes them."""

    def __init__(self, checkpoint: Checkpoint, model: LoadedModel, training: Training, processes: Processes) -> None:
        """Starts at the checkpoint; its device is where all is computed."""
        graph = checkpoint.graph
        self._graph, self._training, self._processes, self._classes = graph, training, processes, model.num_classes
        self._device = next(graph.module.parameters()).device
        self._teacher = model.module.to(self._device).eval().requires_grad_(False)
        # Weights start in the middle of their codes. As float weights, those that compensation moved would start at a code's border.
        self._variables = BlockVariables(graph, checkpoint, list(graph.layers), statistics=training.recipe == "ofq")
        groups = self._variables.groups()
        for group in groups:
            group["weight_decay"] = training.decay if group["kind"] == "steps" else 0.0
        self._optimizer = torch.optim.AdamW(groups, betas=_MOMENTA)
        self._leaves = self._variables.leaves()
        self._averages = self._variables.tensors(copied=True) if training.ema else {}

    def loss(self, batch: Batch, bfloat16: bool = False) -> Tensor:
        """The loss of a batch, a scalar; products in bfloat16 where asked for."""
        images, labels = batch[0].to(self._device), None if batch[1] is None else batch[1].to(self._device)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad():
                wanted = self._teacher(images)
            output = run(self._graph.module, images, self._variables.intercepts())
        return self._training.distillation.loss(output, wanted, labels, self._classes)

    def backward(self, batch: Batch) -> float:
        """Gives all variables their gradients, the means over the processes, and returns this process's loss."""
        with torch.enable_grad():
            loss = self.loss(batch, self._training.bfloat16)
            self._optimizer.zero_grad()
            loss.backward()
        self._processes.average(list(self._leaves.values()))
        return float(loss.detach())

    def step(self, batch: Batch, factor: float, annealing: bool = False) -> float:
        """One step, and the loss before it.

        Args:
            batch: of this process.
            factor: what rates are multiplied with.
            annealing: moves only weights that are close to where rounding changes.

        Raises:
            InputError: the loss is no longer finite.
        """
        loss, rate, other_rates = self.backward(batch), self._training.rate, self._training.other_rates
        if not math.isfinite(loss):
            raise InputError(f"the loss has become {loss}; give smaller --lr and --other-lrs than {rate:g} and {other_rates:g}")
        for group in self._optimizer.param_groups:
            group["lr"] = factor * (rate if group["kind"] == "steps" else other_rates * RATES[group["kind"]])
            if self._training.clip:
                torch.nn.utils.clip_grad_norm_(group["params"], self._training.clip)
        still = self._confident() if annealing else {}
        self._optimizer.step()
        with torch.no_grad():
            for name, (places, values) in still.items():
                self._leaves[name].copy_(torch.where(places, values, self._leaves[name]))
            for name, average in self._averages.items():
                average.lerp_(self._leaves[name], 1 - self._training.ema)
        return loss

    def _confident(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each weight, which of its elements are not near a boundary of rounding, and their values."""
        found = {}
        for name, value in self._variables.steps().items():
            boundary = (value - value.floor() - 0.5).abs()
            found[name] = boundary > _CONFIDENT, self._leaves[name].detach().clone()
        return found

    def seconds_a_step(self, batches: Iterable[Batch], tried: int) -> float:
        """The time of a step, reading its images included, by a few that are not taken; the first one warms up and is not counted."""
        begun = time.perf_counter()
        for index, batch in enumerate(islice(batches, tried)):
            self.backward(batch)
            if index == 0:
                begun = time.perf_counter()
        self._optimizer.zero_grad()
        return (time.perf_counter() - begun) / (tried - 1)

    def mean_loss(self, batches: Iterable[Batch]) -> float:
        """The mean loss over images."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                total += float(self.loss(batch)) * len(batch[0])
                count += len(batch[0])
        if not count:
            raise InputError("none of the images to judge on can be read; give others")
        return total / count

    def finish(self) -> None:
        """Lets the moving averages, where there are some, be the variables; nothing learns any more."""
        self._variables.freeze()
        if self._averages:
            self._variables.put(self._averages)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the variables make, rounded."""
        return self._variables.checkpoint()

    def tensors(self) -> dict[str, Tensor]:
        """Variables, moments and averages: all that a run needs to go on."""
        found = {f"variable {name}": value for name, value in self._leaves.items()}
        found |= {f"average {name}": value for name, value in self._averages.items()}
        for name, leaf in self._leaves.items():
            found |= {f"{part} {name}": value for part, value in self._optimizer.state.get(leaf, {}).items()}
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets what `tensors` gave."""
        self._variables.put({name: tensors[f"variable {name}"] for name in self._leaves})
        for name, average in self._averages.items():
            average.copy_(tensors[f"average {name}"])
        for name, leaf in self._leaves.items():
            parts = {part: tensors[f"{part} {name}"] for part in ("step", "exp_avg", "exp_avg_sq") if f"{part} {name}" in tensors}
            if parts:
                self._optimizer.state[leaf] = {p: v.clone() if p == "step" else v.to(leaf.device).clone() for p, v in parts.items()}
