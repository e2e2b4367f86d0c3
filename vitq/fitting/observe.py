"""All that fitting needs to know of a model's activations, from two passes over the images.

The first one finds the channels' ranges, for the fold; the second one gathers histograms and covariances of the folded graph together.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vitq.fitting.weights import watch_inputs
from vitq.graph import Graph
from vitq.graph.run import Intercept
from vitq.ranges import Batches, Histogram, folded_graph, go_through, watch_histograms


def observe(graph: Graph, batches: Batches) -> tuple[Graph, dict[str, Histogram], dict[str, Tensor]]:
    """The folded graph, histograms of its activations by `Operand.tensor`, covariances of its linears' inputs by layer name.

    Args:
        graph: a rewritten graph.
        batches: the calibration images; gone through twice.
    """
    folded = folded_graph(graph, batches)
    histograms, of_all = watch_histograms(folded)
    sums, of_linears = watch_inputs(folded)
    go_through(folded, batches, of_all | {node: _both(of_all[node], intercept) for node, intercept in of_linears.items()})
    return folded, histograms, {layer: found.covariance for layer, found in sums.items()}


def _both(first: Intercept, second: Intercept) -> Intercept:
    def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return first(lambda *changed: second(compute, *changed), *arguments)

    return intercept
