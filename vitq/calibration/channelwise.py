"""LayerNorm outputs quantized channel by channel, and folded at the planned bits: RepQ-ViT (Li et al., ICCV 2023, section 3.2).

With scale s_c and whole zero point z_c of channel c, s* their mean and z* the rounded mean of the zero points,

    r = s / s*        t = s (z - z*)        gamma' = gamma / r      beta' = (beta + t) / r      W' = W diag(r)      b' = b - W t

and the one quantizer (s*, z*) gives the folded output the codes that (s_c, z_c) gave the channels. Quantizers are fitted from the front to
the back, each to what the layers before it, quantized already, make of the images.

The images go through the network in one batch, as in the paper (32 of them): memory grows with their number.
Differs from the paper: z* is rounded before the fold, as in AdaLog's code, where RepQ-ViT's keeps it broken and so has values between two
codes; where padding enters between the norm and its readers, and for RMSNorm, t is 0. The norm before the head is not folded (as in the
paper's code), nor is attention rescaled.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, highest_code, quantize_weight
from vitq.artifacts import BitPlan, Layer, Operand
from vitq.calibration.blocks import Progress
from vitq.calibration.ticks import tick
from vitq.fitting.percentile import percentile_channels, percentile_log_sqrt2, percentile_uniform, percentile_weights
from vitq.graph import Graph, run, tensor_of
from vitq.graph.layers import operand_nodes
from vitq.graph.run import Intercept
from vitq.quantizers import Quantizer, Uniform
from vitq.ranges import Batches
from vitq.rewrites import fold_factors, foldable_norms, norm_readers


@dataclass(frozen=True)
class Channels:
    """The quantizers of a value's channels at a width: scale and whole zero point, float32 (C,), the latter of any sign."""

    scale: Tensor
    zero_point: Tensor
    bits: int

    def quantize_dequantize(self, x: Tensor) -> Tensor:
        """`x` (..., C) moved to values that have codes."""
        codes = (x / self.scale).round_().add_(self.zero_point).clamp_(0, highest_code(self.bits))
        return codes.sub_(self.zero_point).mul_(self.scale)

    @property
    def common(self) -> Uniform:
        """(s*, z*) of the module's equations."""
        zero_point = int(self.zero_point.double().mean().round().clamp(0, highest_code(self.bits)))
        return Uniform(float(self.scale.mean()), zero_point, self.bits)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The r and t of the module's equations, float64 (C,)."""
        scale, common = self.scale.double(), self.common
        return scale / common.scale, scale * (self.zero_point.double() - common.zero_point)


Fit = Callable[[Tensor, int, Operand, Callable[[Quantizer], float]], Quantizer]
"""The quantizer of an operand that no folded norm makes: from what it holds, at so many bits; the function gives the squared error of the
output of the layer that reads it, under a quantizer."""

Weigh = Callable[[Tensor, Tensor, int], QuantizedWeight]
"""A linear's weight in codes: from the weight, what the layer reads, and bits."""

Choose = Callable[[Channels, Tensor, list[tuple[Tensor, int]]], Channels]
"""What becomes of a norm's channels: from them, the norm's output and its readers' weights, each with its bits."""


def fit_percentile(x: Tensor, bits: int, operand: Operand, error: Callable[[Quantizer], float]) -> Quantizer:
    """RepQ-ViT's: log-sqrt2 for a softmax, uniform else, both from quantiles."""
    return percentile_log_sqrt2(x, bits) if operand.role == "post_softmax" else percentile_uniform(x, bits)


def fold_channelwise(
    graph: Graph,
    plan: BitPlan,
    batches: Batches,
    fit: Fit = fit_percentile,
    choose: Choose = lambda channels, *_: channels,
    progress: Progress | None = None,
) -> tuple[Graph, dict[str, Quantizer]]:
    """The graph folded at the plan's bits, and the quantizers of its activations by `Operand.tensor`.

    Args:
        graph: a rewritten graph.
        plan: bits of every layer.
        batches: the calibration images; gone through once, held in memory.
        fit: fits the operands that no folded norm makes.
        choose: changes a norm's channels before they are folded.
        progress: is told how far it is, layer by layer.
    """
    bits, layers = plan.bits, {layer.name: layer for layer in graph.layers}
    readers = {norm: names for norm, names in norm_readers(graph).items() if all(layers[name].type != "head" for name in names)}
    folded_away = {name for names in readers.values() for name in names}
    channels: dict[str, Channels] = {}
    activations: dict[str, Quantizer] = {}
    told = tick(progress, len(graph.layers), "activations")

    def weight_of(name: str) -> tuple[Tensor, int]:
        width = bits[name].weight_bits
        assert width is not None
        return tensor_of(graph.module, operand_nodes(graph.layer_node(name))[1]), width

    def at_norm(norm: str, shiftable: bool) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            output = compute(*arguments)
            width = bits[readers[norm][0]].activation_bits
            found = Channels(*percentile_channels(output, width, shiftable), width)
            channels[norm] = choose(found, output, [weight_of(name) for name in readers[norm]])
            return channels[norm].quantize_dequantize(output)

        return intercept

    def at_layer(layer: Layer) -> Intercept:
        operands = () if layer.name in folded_away else layer.activations

        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            told()
            read = list(arguments)
            for position, operand in enumerate(operands):
                if operand.tensor not in activations:
                    error = partial(output_error, compute, arguments, position)
                    activations[operand.tensor] = fit(arguments[position], bits[layer.name].activation_bits, operand, error)
                read[position] = activations[operand.tensor].quantize_dequantize(read[position])
            if layer.has_weight:
                weight, width = weight_of(layer.name)
                read[1] = quantize_weight(weight, *percentile_weights(weight, width), width).dequantize()
            return compute(*read)

        return intercept

    norms = {norm: at_norm(norm, shiftable) for norm, shiftable in foldable_norms(graph).items() if norm in readers}
    with torch.no_grad():
        run(graph.module, torch.cat([images for images, _ in batches]), norms | {graph.nodes[x.name]: at_layer(x) for x in graph.layers})
    for norm, names in readers.items():
        for name in names:
            activations[layers[name].operands[0].tensor] = _at_width(channels[norm].common, bits[name].activation_bits)
    return fold_factors(graph, {norm: found.factors for norm, found in channels.items()}), activations


def folded_weights(folded: Graph, plan: BitPlan, symmetric: bool) -> dict[str, QuantizedWeight]:
    """Every layer's weight rounded to the nearest code of its rows' percentile ranges, by layer name."""
    found = {}
    for layer in folded.layers:
        if (width := plan.bits[layer.name].weight_bits) is not None:
            weight = tensor_of(folded.module, operand_nodes(folded.layer_node(layer.name))[1])
            found[layer.name] = quantize_weight(weight, *percentile_weights(weight, width, symmetric), width)
    return found


def fit_in_sequence(
    folded: Graph,
    plan: BitPlan,
    activations: Mapping[str, Quantizer],
    batches: Batches,
    weigh: Weigh,
    symmetric: bool,
    progress: Progress | None = None,
) -> dict[str, QuantizedWeight]:
    """Every layer's weight by layer name, each linear's fitted to what the layers before it, quantized, make of the images.

    Args:
        folded: the folded float graph.
        plan: bits of every layer.
        activations: the quantizers by `Operand.tensor`.
        batches: the calibration images; gone through once, held in memory.
        weigh: fits a linear's weight; convolutions get `folded_weights`.
        symmetric: weights without zero points.
        progress: is told how far it is, layer by layer.
    """
    found = folded_weights(folded, plan, symmetric)
    told = tick(progress, len(folded.layers), "weights")

    def at_layer(layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            told()
            read = quantized_inputs(layer, activations, arguments)
            if not layer.has_weight:
                return compute(*read, *arguments[len(read) :])
            if layer.op == "linear":
                found[layer.name] = weigh(arguments[1], read[0], found[layer.name].bits)
            return compute(*read, found[layer.name].dequantize(), *arguments[2:])

        return intercept

    with torch.no_grad():
        run(
            folded.module,
            torch.cat([images for images, _ in batches]),
            {folded.nodes[layer.name]: at_layer(layer) for layer in folded.layers},
        )
    return found


def quantized_inputs(layer: Layer, activations: Mapping[str, Quantizer], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The activations among a layer's arguments, each in the values that have codes of its quantizer (by `Operand.tensor`)."""
    return [activations[operand.tensor].quantize_dequantize(x) for operand, x in zip(layer.activations, arguments, strict=False)]


def output_error(compute: Callable[..., Tensor], arguments: tuple[Any, ...], position: int, quantizer: Quantizer) -> float:
    """What quantizing one argument of an op changes of its output, which is linear in it: the sum of squares."""
    x = arguments[position]
    operands = list(arguments[:2])
    operands[position] = quantizer.quantize_dequantize(x) - x
    rest = (None, *arguments[3:]) if len(arguments) > 2 else ()  # a bias adds the same to both outputs
    return float(compute(*operands, *rest).square().sum(dtype=torch.float64))


def _at_width(common: Uniform, bits: int) -> Uniform:
    """The same range in as many steps as another width has; readers of different parts of a norm's output may differ in bits."""
    ratio = highest_code(bits) / highest_code(common.bits)
    return common if bits == common.bits else Uniform(float(torch.tensor(common.scale / ratio)), round(common.zero_point * ratio), bits)
