"""What the recipes that learn will take, said before they start: seconds from one timed pass, memory from another, disk from shapes.

Their memory is most where the learning has ended: what each layer costs is found by gradients of the whole network (attribution.py).
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.artifacts import BitPlan
from vitq.calibration.held import Held
from vitq.calibration.learning import Learning
from vitq.errors import InputError
from vitq.gradients import pair_for, trace
from vitq.graph import Graph, run

_STEP = 7.0  # forward passes of a block that a step on it costs, quantized, with backward, Adam and reading; seen on a CPU
_PASSES = 5.0  # forward passes over all views beside the steps: both networks, the errors' weights, judging
_KEPT = 3.0  # what a step holds of a block, in units of all its values: values, steps and codes
_AROUND = 1.5  # times the bytes of a pass of gradients: quantized layers beside it, and what the allocator keeps; seen on a CPU

HELD_AT_ONCE = 2.0
"""Times the bytes that a recipe's tensors hold: what sorting takes beside them, and what the allocator keeps; seen on a CPU."""


@dataclass(frozen=True)
class Estimate:
    """Seconds on this machine, bytes of memory beside what the process has, and bytes of the scratch folder at its fullest.

    Only the memory does not depend on the number of images.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(graph: Graph, plan: BitPlan, num_images: int, learning: Learning, batch_size: int = 32) -> Estimate:
    """What learning takes with so many images.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer.
        num_images: calibration images.
        learning: how blocks are learned.
        batch_size: images a batch, as they come.

    Raises:
        InputError: the plan does not fit the graph.
    """
    plan.check(graph.layers)
    if num_images < 1:
        raise InputError("there are no images to calibrate on")
    batch = learning.batch_size
    images = torch.zeros(batch, *graph.input_shape)
    with torch.no_grad():
        run(graph.module, images)  # the first pass is slower
        started = time.perf_counter()
        run(graph.module, images)
        forward = time.perf_counter() - started
    seconds = forward * (_STEP * learning.iterations + _PASSES * learning.views * num_images / batch)
    block_values, cut_values = _values(graph)
    parameters = sum(tensor.numel() for tensor in graph.module.state_dict().values())
    with Held() as held:
        trace(graph, images.new_zeros(batch_size, *graph.input_shape), pair_for(plan.model.num_classes), torch.Generator(), lambda _: None)
    memory = round(max(4 * _KEPT * batch * block_values, _AROUND * held.most)) + 4 * 6 * parameters
    disk = 4 * learning.views * num_images * (4 * cut_values + sum(graph.input_shape)) + 8 * parameters
    return Estimate(seconds, memory, disk)


def _values(graph: Graph) -> tuple[int, int]:
    """The numbers that one image has in the largest block, and at the largest cut."""
    sizes = {node.name: node.meta["val"].numel() for node in graph.module.graph.nodes if isinstance(node.meta.get("val"), Tensor)}
    firsts = {block.first for block in graph.blocks}
    blocks = [0]
    for node in graph.module.graph.nodes:
        if node.name in firsts:
            blocks.append(0)
        if node.op == "call_function":
            blocks[-1] += sizes.get(node.name, 0)
    return max(blocks), max(sum(sizes.get(name, 0) for name in block.inputs) for block in graph.blocks)
