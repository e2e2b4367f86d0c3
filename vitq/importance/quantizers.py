"""The quantizers that `calibrate` would use, of every layer at every width, and a layer's op run with them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitq.affine import QuantizedWeight
from vitq.artifacts import Layer, Operand
from vitq.fitting import fit_operand, fit_weights, relative_error, roles
from vitq.graph import tensor_of
from vitq.graph.layers import operand_nodes
from vitq.importance.subject import Subject
from vitq.quantizers import IntegerQuantizer


@dataclass(frozen=True)
class Quantizers:
    """Fitted quantizers: those of activations by (`Operand.tensor`, width), weights in codes by (layer name, width)."""

    activations: Mapping[tuple[str, int], IntegerQuantizer]
    weights: Mapping[tuple[str, int], QuantizedWeight]

    @classmethod
    def of(cls, subject: Subject, bits: Collection[int]) -> "Quantizers":
        """Fits the quantizers of a subject at the widths `bits`."""
        graph, role = subject.graph, roles(subject.graph.layers)
        widths = sorted(bits)
        weights = {layer.name: fit_weights(graph, subject.covariances, layer.name, widths) for layer in graph.layers if layer.has_weight}
        return cls(
            {(tensor, width): fit_operand(found, width, role[tensor]) for tensor, found in subject.histograms.items() for width in bits},
            {(name, weight.bits): weight for name, found in weights.items() for weight in found},
        )

    def read(self, layer: Layer, inputs: Sequence[Tensor], bits: int) -> list[Tensor]:
        """A layer's activations as it reads them at a width, `inputs` being its arguments."""
        found = [self.activations[operand.tensor, bits] for operand in layer.activations]
        return [quantizer.quantize_dequantize(x) for x, quantizer in zip(inputs, found, strict=False)]

    def output(
        self, layer: Layer, compute: Callable[..., Tensor], arguments: Sequence[Any], weight_bits: int | None, activation_bits: int | None
    ) -> Tensor:
        """A layer's output without its bias, its operands at the widths given; at None they stay float. `arguments` are its node's."""
        read = list(arguments[: len(layer.activations)]) if activation_bits is None else self.read(layer, arguments, activation_bits)
        if not layer.has_weight:
            return compute(*read)
        weight = arguments[1] if weight_bits is None else self.weights[layer.name, weight_bits].dequantize()
        return compute(*read, weight, None, *arguments[3:])

    def relative_errors(self, subject: Subject, layer: Layer, bits: int) -> tuple[float, float]:
        """The power of the quantization error over the operand's own: of the weight (0 without one), and of the inputs, summed."""
        inputs = sum(self.input_error(subject, operand, bits) for operand in layer.activations)
        if not layer.has_weight:
            return 0.0, inputs
        weight = layer_weight(subject, layer)
        error = (self.weights[layer.name, bits].dequantize() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        return float(error), inputs

    def input_error(self, subject: Subject, operand: Operand, bits: int) -> float:
        """The power of an activation's quantization error over its own."""
        return relative_error(subject.histograms[operand.tensor], self.activations[operand.tensor, bits])


def layer_weight(subject: Subject, layer: Layer) -> Tensor:
    """The float weight of a layer that has one."""
    return tensor_of(subject.graph.module, operand_nodes(subject.graph.layer_node(layer.name))[1])
