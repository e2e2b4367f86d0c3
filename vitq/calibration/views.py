"""More images to learn from: each calibration image again, turned, moved and mixed with another.

    view = (1 - a) t(x) + a t(x'),        a in [0, 1/2]

with t a random mirroring and shift by up to an eighth of the side, and x' another image of the same batch. The float network says what
its output should be, so views need no labels. A few hundred images teach a block's weights the images themselves; several views of each
teach it what the network does. Mixed ones are uncertain, where the network's own training images are confident.
"""

import torch
from torch import Tensor

_MIXED = 0.5  # of all views


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """One view of each image, (B, 3, H, W), on the CPU."""
    count, _, height, width = images.shape
    mirrored = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, images, images.flip(3))
    down, right = height // 8, width // 8
    padded = torch.nn.functional.pad(mirrored, (right, right, down, down), mode="reflect")
    tops = torch.randint(0, 2 * down + 1, (count,), generator=generator).tolist()
    lefts = torch.randint(0, 2 * right + 1, (count,), generator=generator).tolist()
    moved = torch.stack([image[:, top : top + height, left : left + width] for image, top, left in zip(padded, tops, lefts, strict=True)])
    amount = torch.rand(count, 1, 1, 1, generator=generator) / 2
    amount = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < _MIXED, amount, 0.0)
    return torch.lerp(moved, moved[torch.randperm(count, generator=generator)], amount)
