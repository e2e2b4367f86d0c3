"""Calibrated models for the export tests: random weights and biases, ranges by minimum and maximum, any widths."""

import zlib
from collections.abc import Callable

import numpy as np
import timm
import torch
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn

from vitq.affine import quantize_weight, weight_qparams
from vitq.artifacts import BitPlan, Layer, LayerBits, ModelSpec
from vitq.checkpoint import Checkpoint
from vitq.graph import analyse, assign, capture, copy, values_at
from vitq.quantizers import Uniform
from vitq.rewrites import rewrite

Widths = int | Callable[[Layer], int]


def small_vit(**arguments: object) -> nn.Module:
    """A ViT of two blocks for images of 32x32, in 17 tokens."""
    fused = use_fused_attn()
    set_fused_attn(False)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return timm.create_model(
                "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10, **arguments
            ).eval()
    finally:
        set_fused_attn(bool(fused))


def mixed(layer: Layer) -> int:
    """A width 2 to 8 that depends on what the layer reads, so that readers of one tensor agree."""
    return 2 + zlib.crc32(layer.operands[0].tensor.encode()) % 7


def random_images(count: int, input_shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    return torch.randn(count, *input_shape, generator=torch.Generator().manual_seed(seed))


def make_checkpoint(
    model: nn.Module, input_shape: tuple[int, int, int] = (3, 32, 32), weight: Widths = 8, activation: Widths = 8, symmetric: bool = False
) -> Checkpoint:
    """A checkpoint of a model with every parameter and buffer of one axis made random, non-zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() <= 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + float(name.endswith("weight")))
    graph = rewrite(capture(model.eval(), input_shape))
    values = values_at(
        graph.module, random_images(4, input_shape), {operand.tensor for layer in graph.layers for operand in layer.activations}
    )
    activations: dict[str, Uniform] = {}
    weights, entries, dequantized = {}, [], {}
    tensors = graph.module.state_dict()
    for layer in graph.layers:
        for operand in layer.activations:
            activations.setdefault(operand.tensor, _qparams(values[operand.tensor], _bits(activation, layer)))
        weight_bits = None
        if layer.has_weight:
            weight_bits, tensor = _bits(weight, layer), tensors[layer.operands[1].tensor]
            rows = tensor.flatten(1)
            weights[layer.name] = quantize_weight(tensor, *weight_qparams(rows.amin(1), rows.amax(1), weight_bits, symmetric), weight_bits)
            dequantized[layer.operands[1].tensor] = weights[layer.name].dequantize()
        bits = activations[layer.operands[0].tensor].bits
        entries.append(LayerBits(name=layer.name, type=layer.type, weight_bits=weight_bits, activation_bits=bits))
    module = copy(graph)
    assign(module, dequantized)
    data_config = {"input_size": list(input_shape), "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}
    spec = ModelSpec(
        architecture="small", num_classes=10, data_config=data_config, label_names=("première", "b"), graph_digest=graph.digest
    )
    return Checkpoint(analyse(module, input_shape), BitPlan(model=spec, layers=tuple(entries)), weights, activations)


def _bits(widths: Widths, layer: Layer) -> int:
    return widths if isinstance(widths, int) else widths(layer)


def _qparams(values: Tensor, bits: int) -> Uniform:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = float(np.float32(0.95 * (high - low) / (2**bits - 1)))  # less than the range: some codes are clipped
    return Uniform(scale, round(min(max(-low / scale, 0), 2**bits - 1)), bits)
