"""A batch of images from noise, by gradient descent on their pixels.

Adam on x ~ N(0, 1), preprocessed, in two stages; each warms up for a fifth of its steps and falls by a cosine. Every step sees the batch
rolled and perhaps mirrored, by at most a fifteenth of its side in the first stage and twice that in the second, and ends within
what a picture can hold. (PSAQ-ViT, its code generate_data.py: two stages of 500 steps.)

Differs from the paper: the rolls are stated as shares of the side, 15 and 30 pixels of 224. One rate for all architectures; the
code's for Swin is a quarter larger.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitq.synthesize.objective import VARIATION, Objective
from vitq.synthesize.pictures import bounds

STAGES = (15 / 224, 30 / 224)
"""The largest roll of each stage, in sides of the image."""

RATE, BETAS, WARM_UP = 0.2, (0.5, 0.9), 0.2


def descend(
    objective: Objective,
    data_config: dict[str, Any],
    count: int,
    labels: Tensor | None,
    steps: int,
    generator: torch.Generator,
    told: Callable[[int], None] | None = None,
) -> Tensor:
    """Images made in so many steps.

    Args:
        objective: what they are to be.
        data_config: the model's preprocessing.
        count: how many, B.
        labels: the classes they are to be of, int64 (B,); None for a model without.
        steps: of both stages together.
        generator: on the CPU, all that is random.
        told: called with the steps done.

    Returns:
        float32 (B, C, H, W), preprocessed, on the model's device.
    """
    device = next(objective.graph.module.parameters()).device
    images = torch.randn(count, *data_config["input_size"], generator=generator).to(device).requires_grad_()
    least, most = (bound.to(device) for bound in bounds(data_config))
    variation = (VARIATION[0] + (VARIATION[1] - VARIATION[0]) * torch.rand(count, generator=generator)).to(device)
    adam = torch.optim.Adam([images], lr=RATE, betas=BETAS)
    for step in range(steps):
        stage, within, length = _place(step, steps)
        adam.param_groups[0]["lr"] = RATE * schedule(within, length)
        furthest = round(STAGES[stage] * images.shape[-1])
        seen = _moved(images, furthest, generator)
        (images.grad,) = torch.autograd.grad(objective.loss(seen, labels, variation), images)  # none for the parameters
        adam.step()
        with torch.no_grad():
            images.copy_(images.clamp(least, most))
        if told:
            told(step + 1)
    return images.detach()


def schedule(step: int, steps: int) -> float:
    """The share of the rate at a step of a stage: a straight line up, then half a cosine down."""
    rising = round(WARM_UP * steps)
    return (step + 1) / rising if step < rising else 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def _place(step: int, steps: int) -> tuple[int, int, int]:
    """The stage of a step, the step within it, and the stage's steps."""
    first = (steps + 1) // 2
    return (0, step, first) if step < first else (1, step - first, steps - first)


def _moved(images: Tensor, furthest: int, generator: torch.Generator) -> Tensor:
    """The images rolled along the diagonal and, one time in two, mirrored."""
    distance = int(torch.randint(-furthest, furthest + 1, (), generator=generator))
    rolled = images.roll((distance, distance), (2, 3))
    return rolled.flip(3) if int(torch.randint(2, (), generator=generator)) else rolled
