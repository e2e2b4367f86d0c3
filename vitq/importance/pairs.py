"""What layers cost together: CLADO's cross-layer terms, from the same pass that prices each layer alone.

With u_{n,l,b} as in output_fisher.py, two layers quantized at once cost 1/2 mean_n (u_l + u_k)^2, which is what each costs alone and

    pair(l, b; k, b') = mean_n u_{n,l,b} u_{n,k,b'}            [nats per image, of either sign]

From CLADO (Deng et al., arXiv 2307.05657). Differs from the paper: it measures the loss with two layers quantized, for every pair; here the
Fisher information stands in for the loss, and one backward pass serves all pairs. Only layers of one block and of adjacent blocks are
paired. The terms are means of products of either sign, so they need more images than the costs do.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from vitq.artifacts import PairCost
from vitq.graph import Graph


class PairMoments:
    """Sums over the images of products between layers; memory does not grow with the images.

    A layer's columns are <g, y^ - y> at each tied width, then <g, y>; its u is gain <g, y^ - y> + (gain - 1) <g, y>.
    """

    def __init__(self, graph: Graph, widths: int) -> None:
        """Begins with no image."""
        self._graph, self._columns = graph, widths + 1
        self._place = {layer.name: index * self._columns for index, layer in enumerate(graph.layers)}
        size = len(graph.layers) * self._columns
        self._sums, self._batch = np.zeros((size, size)), dict[str, np.ndarray]()

    def add(self, layer: str, errors: Tensor, output: Tensor) -> None:
        """Takes one layer's products of the current batch: errors (images, widths) at tied widths and output (images,)."""
        self._batch[layer] = torch.cat([errors, output[:, None]], 1).double().numpy(force=True)

    def end_batch(self) -> None:
        """Adds the batch's products of all layers; one that no gradient reached adds nothing."""
        images = max((len(rows) for rows in self._batch.values()), default=0)
        rows = np.zeros((images, len(self._sums)))
        for layer, found in self._batch.items():
            rows[:, self._place[layer] : self._place[layer] + self._columns] = found
        self._sums += rows.T @ rows
        self._batch.clear()

    def costs(self, gains: Mapping[str, np.ndarray], count: int) -> tuple[PairCost, ...]:
        """The terms of all pairs of near layers, in the order of the graph; gains are one a tied width, count the images."""
        position = {block.name: index for index, block in enumerate(self._graph.blocks)}
        near = [
            (first.name, second.name)
            for first, second in combinations(self._graph.layers, 2)
            if abs(position[first.block] - position[second.block]) <= 1
        ]
        return tuple(self._cost(first, second, gains, count) for first, second in near)

    def _cost(self, first: str, second: str, gains: Mapping[str, np.ndarray], count: int) -> PairCost:
        at, other = (slice(self._place[name], self._place[name] + self._columns) for name in (first, second))
        left, right = (np.column_stack([np.diag(gains[name]), gains[name] - 1]) for name in (first, second))
        table = left @ self._sums[at, other] @ right.T / count
        return PairCost(first=first, second=second, costs=tuple(tuple(float(value) for value in row) for row in table))
