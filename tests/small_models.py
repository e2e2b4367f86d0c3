"""Small models for the tests of the core: timm families cut down, and hand-written modules for corner cases.

All weights, biases and BatchNorm statistics are random and non-zero (timm starts many at zero, which would hide a lost bias), drawn from
their own generator. Attention is unfused, as `vitq.models` builds it.
"""

import math
from functools import cache

import timm
import torch
from timm.layers.config import set_fused_attn, use_fused_attn
from torch import Tensor, nn

from vitq.graph import Graph, capture

torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it gives, far more on a busy machine

FAMILIES: dict[str, tuple[str, int, dict]] = {
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}),
    # 40 / 4 = 10 patches a side in windows of 4: padded to 12, shifted in every second block
    "swin": (
        "swin_tiny_patch4_window7_224",
        40,
        {"img_size": 40, "window_size": 4, "embed_dim": 32, "depths": (2, 1), "num_heads": (2, 4), "strict_img_size": False},
    ),
    "levit": ("levit_128s", 64, {"img_size": 64, "embed_dim": (32, 48), "depth": (1, 1), "num_heads": (2, 3), "key_dim": 8}),
    "cait": ("cait_xxs24_224", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}),
    # the key-value convolution is one linear more over patches of what the query reads
    "pvt": (
        "pvt_v2_b0",
        64,
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2)},
    ),
    "visformer": ("visformer_tiny", 64, {"img_size": 64, "embed_dim": 48, "depth": (1, 1, 1), "num_heads": 3}),
}


def timm_model(family: str, num_classes: int = 10, fused: bool = False) -> nn.Module:
    name, _, arguments = FAMILIES[family]
    fused_before = use_fused_attn()
    set_fused_attn(fused)
    try:
        model = randomised(timm.create_model(name, num_classes=num_classes, **arguments))
        return _with_fitting_statistics(model, FAMILIES[family][1])
    finally:
        set_fused_attn(bool(fused_before))


def _with_fitting_statistics(model: nn.Module, size: int) -> nn.Module:
    """BatchNorm statistics near those of the values that arrive, else activations grow from layer to layer."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    if norms:
        generator = torch.Generator().manual_seed(1)
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(images(8, size))
            for norm in norms:
                assert norm.running_mean is not None and norm.running_var is not None
                norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn(norm.running_mean.shape, generator=generator)
                norm.running_var *= (0.5 * torch.randn(norm.running_var.shape, generator=generator)).exp()
    return model.eval()


@cache
def captured(family: str, num_classes: int = 10) -> tuple[nn.Module, Graph]:
    """A model and its graph, shared by the tests: both are only read."""
    model = timm_model(family, num_classes)
    size = FAMILIES[family][1]
    return model, capture(model, (3, size, size))


def captured_module(module: nn.Module, size: int | tuple[int, int] = 8) -> Graph:
    height, width = (size, size) if isinstance(size, int) else size
    return capture(module, (3, height, width))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.copy_(normal(parameter) / math.sqrt(max(parameter[0].numel(), 1)))
            else:
                parameter.copy_(0.3 * normal(parameter))
        for child in module.modules():
            if isinstance(child, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm1d | nn.BatchNorm2d) and child.weight is not None:
                child.weight.copy_(normal(child.weight).mul(0.7).exp())  # gains that differ by an order of magnitude
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.running_mean is not None and child.running_var is not None:
                child.running_mean.copy_(0.5 * normal(child.running_mean))
                child.running_var.copy_(normal(child.running_var).exp())
    return module.eval()


def images(count: int, size: int | tuple[int, int], seed: int = 0) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """Images to tokens through a patch embedding, then what is under test, then the mean over tokens."""

    def __init__(self, body: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, channels, 2, 2)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embed(x).flatten(2).transpose(1, 2)).flatten(1, -2).mean(1)


class ThreeProjections(nn.Module):
    """Attention with queries, keys and values from three linears."""

    def __init__(self, channels: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return x + self.out((scores @ v).transpose(1, 2).flatten(2))


class NormThenLinear(nn.Module):
    """A residual branch of a LayerNorm, two linears and a GELU."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))
