"""What synthetic images are to be: various to the model's attention, of a class, and as rough as photographs.

    L(x) = -mean_l H_l(x) + CE(f(x), y) + w |TV(x) - v|,         averaged over the images (PSAQ-ViT)

H_l is the entropy of similarities in place l, y the prescribed class, and TV the root mean square of the differences between
neighbouring pixels, averaged over four directions. A model without a classifier goes without CE.

Differs from the paper: H is averaged over layers, where the code sums. The code's norms of differences over the batch, 2500 to 3000 for
32 images of 224 pixels, are stated for a pixel, so that sizes and batches make no difference; v is drawn for each image.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vitq.graph import Graph, values_at
from vitq.synthesize.entropy import differential_entropy, similarities
from vitq.synthesize.patches import Place, places

_PAPER = 4 * math.sqrt(32 * 3 * 224 * 224)  # four norms, of about so many differences each: turns the code's TV into a pixel's
VARIATION = (2500 / _PAPER, 3000 / _PAPER)
"""The range of v, in standard deviations of a pixel: 0.28 to 0.34."""

VARIATION_WEIGHT = 0.05 * _PAPER
"""w."""


@dataclass(frozen=True)
class Parts:
    """Of each image, (B,): the mean entropy (nats), the cross-entropy (nats; 0 without a class) and TV; and the model's output (B, ...)."""

    entropy: Tensor
    cross_entropy: Tensor
    variation: Tensor
    output: Tensor


@dataclass(frozen=True)
class Objective:
    """L of a captured model, whose patches are compared in some places of its graph."""

    graph: Graph
    places: tuple[Place, ...]

    def parts(self, images: Tensor, labels: Tensor | None) -> Parts:
        """The terms of L of images (B, C, H, W), preprocessed, and their classes (B,), int64."""
        (last,) = self.graph.module.graph.output_node().all_input_nodes
        values = values_at(self.graph.module, images, {last.name, *(place.node for place in self.places)})
        output = values[last.name]
        compared = [similarities(place.patches(values[place.node], len(images))) for place in self.places]
        entropy = torch.stack([differential_entropy(cosines) for cosines in compared]).mean(0)
        classes = torch.zeros_like(entropy) if labels is None else cross_entropy(output, labels, reduction="none")
        return Parts(entropy, classes, total_variation(images), output)

    def loss(self, images: Tensor, labels: Tensor | None, variation: Tensor) -> Tensor:
        """L, a scalar, with v of each image in `variation` (B,)."""
        parts = self.parts(images, labels)
        return (-parts.entropy + parts.cross_entropy + VARIATION_WEIGHT * (parts.variation - variation).abs()).mean()


def objective_of(graph: Graph) -> Objective:
    """The objective of a captured model; raises InputError where it has no patches to compare."""
    return Objective(graph, places(graph))


def total_variation(images: Tensor) -> Tensor:
    """The roughness of images (B, C, H, W): (B,), the mean over four directions of the root mean square difference of neighbours."""
    right, down = images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]
    falling, rising = images[..., 1:, 1:] - images[..., :-1, :-1], images[..., 1:, :-1] - images[..., :-1, 1:]
    squares = [difference.square().flatten(1).mean(1) for difference in (right, down, falling, rising)]
    return (torch.stack(squares) + 1e-12).sqrt().mean(0)  # the root's slope at 0 is infinite
