"""How various an image's patches are to a model: the differential entropy of the similarities between them.

For the attention outputs u_1 .. u_N of an image's patches in one layer, in nats (PSAQ-ViT),

    s_ij = u_i . u_j / (|u_i| |u_j|),                            i < j, M pairs
    p(x) = 1 / (M h sqrt(2 pi)) sum_ij exp(-(x - s_ij)^2 / 2 h^2)
    H    = -integral of p(x) log p(x) dx                         from the smallest s_ij to the largest

Noise makes all patches alike, and H small; foreground and background make them alike and unlike, and H large. Attention within windows
compares the patches of a window; an image's similarities are those of all its windows.

Differs from the paper: of its code. The ends of the integral are an image's own, not those of the batch; a patch is not compared with
itself, which is always 1; of a Swin's window no patch is dropped as if it were a class token; of more than `MOST_PATCHES` patches, as
many at equal distances are compared.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

BANDWIDTH = 0.01
"""h, in units of the cosine."""

POINTS = 10
"""Where the density is estimated; their places move with the ends, so that steps of the descent see different ones."""

MOST_PATCHES = 196
"""As many as an image of 224 pixels has at 16 pixels a patch; the pairs of more would fill the memory."""

_FLOOR = 1e-4  # added to the density, whose logarithm must be finite


def similarities(patches: Tensor) -> Tensor:
    """The cosine of every two patches of a window: (B, windows, N, C) to (B, windows N (N - 1) / 2), in [-1, 1]."""
    count = patches.shape[2]
    if count > MOST_PATCHES:
        chosen = torch.linspace(0, count - 1, MOST_PATCHES, device=patches.device).long()
        patches, count = patches[:, :, chosen], MOST_PATCHES
    directions = normalize(patches, dim=-1)
    first, second = torch.triu_indices(count, count, 1, device=patches.device)
    return (directions @ directions.mT)[..., first, second].flatten(1)


def differential_entropy(values: Tensor, bandwidth: float = BANDWIDTH, points: int = POINTS) -> Tensor:
    """H of each row of values (B, M), in nats: (B,); differentiable in the values, the ends held constant."""
    least, most = values.detach().aminmax(dim=1)
    x = least[:, None] + (most - least)[:, None] * torch.linspace(0, 1, points, device=values.device)  # (B, points)
    kernel = (-0.5 * ((x[:, :, None] - values[:, None, :]) / bandwidth).square()).exp()  # (B, points, M)
    density = kernel.mean(2) / (bandwidth * math.sqrt(2 * math.pi)) + _FLOOR
    return torch.trapezoid(-density * density.log(), x, dim=1)
