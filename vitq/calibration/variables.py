"""What of a block is learned: weights in steps, gains of their scales, biases, and the activations' scales and zero points.

Every variable starts where a calibrated checkpoint has it, in units in which one learning rate serves all layers: weights in steps of
their own scale, scales as logarithms of their change, zero points in codes, biases in the output channels' spread. Rounded, they are
codes, scales and biases again: an ordinary part of a checkpoint.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitq.affine import QuantizedWeight, highest_code, weight_codes
from vitq.artifacts import Layer
from vitq.calibration.learned import learned_activation, learned_weight, straight_through
from vitq.checkpoint import Checkpoint
from vitq.graph import Graph, assign, copy, tensor_of
from vitq.graph.dataflow import argument
from vitq.graph.layers import operand_nodes
from vitq.graph.run import Intercept
from vitq.quantizers import Uniform

RATES = {"steps": 0.01, "gain": 0.003, "bias": 0.01, "range": 0.005, "zero_point": 0.02}
"""Adam's first learning rate of each kind of variable, in its own unit."""

_INSIDE = 0.499  # of a step: a weight starts where it rounds to the code that the checkpoint has


@dataclass
class Learned:
    """One layer's or activation's variables by kind, and what they are changes of."""

    variables: dict[str, Tensor]
    fixed: dict[str, Tensor]


class BlockVariables:
    """The variables of some layers, those of one block, and the layers' ops under them."""

    def __init__(self, floats: Graph, checkpoint: Checkpoint, layers: list[Layer], settled: Collection[str] = ()) -> None:
        """Starts at the checkpoint.

        Args:
            floats: the folded float graph that the checkpoint was made from, of the same nodes.
            checkpoint: where learning starts.
            layers: the block's layers.
            settled: activations that an earlier block reads too, and has learned.
        """
        self._checkpoint, self._layers, self._nodes = checkpoint, layers, floats.nodes
        self._weights = {layer.name: _weight(floats, checkpoint, layer) for layer in layers if layer.has_weight}
        device = next(checkpoint.graph.module.parameters()).device
        learned = {operand.tensor for layer in layers for operand in layer.activations}
        self._activations = {
            tensor: _activation(quantizer, device)
            for tensor, quantizer in checkpoint.activations.items()
            if tensor in learned and tensor not in settled and isinstance(quantizer, Uniform)
        }

    @property
    def activations(self) -> set[str]:
        """The activations that are learned, by `Operand.tensor`."""
        return set(self._activations)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, one a kind, each with its rate; all variables now want gradients."""
        found: dict[str, list[Tensor]] = {}
        for learned in (*self._weights.values(), *self._activations.values()):
            for kind, variable in learned.variables.items():
                found.setdefault(kind, []).append(variable.requires_grad_())
        return [{"params": variables, "lr": RATES[kind], "rate": RATES[kind]} for kind, variables in found.items()]

    def freeze(self) -> None:
        """Lets no variable want gradients any longer."""
        for learned in (*self._weights.values(), *self._activations.values()):
            for variable in learned.variables.values():
                variable.requires_grad_(False)

    def tensors(self, copied: bool = False) -> dict[str, Tensor]:
        """All variables by name, detached; as they are now, where `copied`."""
        entries = {**self._weights, **self._activations}
        found = {f"{kind}:{name}": value.detach() for name, learned in entries.items() for kind, value in learned.variables.items()}
        return {name: value.clone() for name, value in found.items()} if copied else found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the variables to what `tensors` gave."""
        with torch.no_grad():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])

    def intercepts(self) -> dict[str, Intercept]:
        """What runs in the place of the layers' nodes: the layers quantized as the variables have it."""
        return {self._nodes[layer.name]: self._intercept(layer) for layer in self._layers}

    def _intercept(self, layer: Layer) -> Intercept:
        def intercept(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
            count = len(layer.activations)
            read = [self._read(operand.tensor, x) for operand, x in zip(layer.activations, arguments, strict=False)]
            if not layer.has_weight:
                return compute(*read, *arguments[count:])
            weight, bias = _weight_and_bias(self._weights[layer.name])
            return compute(*read, weight, bias, *arguments[3:])

        return intercept

    def _read(self, tensor: str, x: Tensor) -> Tensor:
        if (learned := self._activations.get(tensor)) is None:
            return straight_through(x, self._checkpoint.activations[tensor])
        bits = self._checkpoint.activations[tensor].bits
        return learned_activation(x, _scale(learned, "range"), _zero_point(learned, bits), bits)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint with this block as the variables have it, rounded."""
        before = self._checkpoint
        weights, activations, tensors = dict(before.weights), dict(before.activations), dict[str, Tensor]()
        with torch.no_grad():
            for layer in self._layers:
                if layer.has_weight:
                    learned = self._weights[layer.name]
                    lowest, highest = learned.fixed["lowest"], learned.fixed["highest"]
                    integers = torch.minimum(torch.maximum(learned.variables["steps"].round(), lowest), highest)
                    codes = (integers + learned.fixed["zero_point"]).to(torch.uint8)
                    scale = _scale(learned, "gain").flatten()
                    weights[layer.name] = replace(before.weights[layer.name], codes=codes, scale=scale)
                    tensors[layer.operands[1].tensor] = weights[layer.name].dequantize()
                    tensors[_bias_name(before.graph, layer)] = _weight_and_bias(learned)[1]
            for tensor, learned in self._activations.items():
                bits = activations[tensor].bits
                activations[tensor] = Uniform(float(_scale(learned, "range")), int(_zero_point(learned, bits).round()), bits)
        module = copy(before.graph)
        assign(module, tensors)
        module.recompile()
        graph = before.graph
        return replace(
            before,
            graph=Graph(module, graph.input_shape, graph.layers, graph.nodes, graph.blocks),
            weights=weights,
            activations=activations,
        )


def _weight(floats: Graph, checkpoint: Checkpoint, layer: Layer) -> Learned:
    """The variables of a weight: v starts at the weight in steps, or where next to it the code is the checkpoint's."""
    quantized: QuantizedWeight = checkpoint.weights[layer.name]
    per_channel = (-1, *[1] * (quantized.codes.dim() - 1))
    scale, zero_point = quantized.scale.reshape(per_channel), quantized.zero_point.float().reshape(per_channel)
    lowest, highest = (code - zero_point for code in weight_codes(quantized.bits))
    integers = quantized.codes - zero_point
    steps = tensor_of(floats.module, operand_nodes(floats.layer_node(layer.name))[1]) / scale
    steps = torch.maximum(torch.minimum(steps, integers + _INSIDE), integers - _INSIDE)
    bias = tensor_of(checkpoint.graph.module, argument(checkpoint.graph.layer_node(layer.name), 2)).detach()
    unit = (scale * integers).flatten(1).norm(dim=1)  # the spread of a channel whose inputs are independent and of spread 1
    return Learned(
        {"steps": steps.clone(), "gain": torch.zeros_like(scale), "bias": torch.zeros_like(bias)},
        {"scale": scale, "zero_point": zero_point, "lowest": lowest, "highest": highest, "bias": bias, "unit": unit},
    )


def _activation(quantizer: Uniform, device: torch.device) -> Learned:
    scale, zero_point = (torch.tensor(float(value), device=device) for value in (quantizer.scale, quantizer.zero_point))
    return Learned({"range": torch.zeros_like(scale), "zero_point": zero_point}, {"scale": scale})


def _scale(learned: Learned, kind: str) -> Tensor:
    return learned.fixed["scale"] * learned.variables[kind].exp()


def _zero_point(learned: Learned, bits: int) -> Tensor:
    return learned.variables["zero_point"].clamp(0, highest_code(bits))


def _weight_and_bias(learned: Learned) -> tuple[Tensor, Tensor]:
    weight = learned_weight(learned.variables["steps"], _scale(learned, "gain"), learned.fixed["lowest"], learned.fixed["highest"])
    return weight, learned.fixed["bias"] + learned.variables["bias"] * learned.fixed["unit"]


def _bias_name(graph: Graph, layer: Layer) -> str:
    return str(argument(graph.layer_node(layer.name), 2).target)
