"""What recipe `reconstruct` will take, said before it starts: seconds from one timed pass, memory and disk from the graph's shapes."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vitq.artifacts import BitPlan
from vitq.calibration.learning import Learning
from vitq.errors import InputError
from vitq.graph import Graph, run

_STEP = 7.0  # forward passes of a block that a step on it costs, quantized, with backward, Adam and reading; seen on a CPU
_PASSES = 5.0  # forward passes over all views beside the steps: both networks, the errors' weights, judging
_KEPT = 3.0  # what a step holds of a block, in units of all its values: values, steps and codes
_BASE_BYTES = 500_000_000  # the process with torch loaded


@dataclass(frozen=True)
class Estimate:
    """Seconds on this machine, bytes of memory, whatever the number of images, and bytes of the scratch folder at its fullest."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate(graph: Graph, plan: BitPlan, num_images: int, learning: Learning) -> Estimate:
    """What learning takes with so many images.

    Args:
        graph: the captured graph after `rewrite`.
        plan: bits of every layer.
        num_images: calibration images.
        learning: how blocks are learned.

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
    memory = _BASE_BYTES + round(4 * (_KEPT * batch * block_values + 6 * parameters))
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
