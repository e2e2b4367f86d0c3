"""What of a block, or of all, is learned: weights in steps, gains of their scales, biases, activations' scales and zero points, LayerNorms.

Every variable starts where a calibrated checkpoint has it, in units in which one learning rate serves all layers: weights in steps of
their own scale, scales and gains as logarithms of their change, zero points in codes, biases in the output channels' spread. Rounded,
they are codes, scales and biases again: an ordinary part of a checkpoint. A LayerNorm that a layer of the block reads has

    gamma^ = gamma e^g,        beta^ = beta + |gamma| b

which stays float and costs nothing: how far a channel reaches into the one range of all of them is learned by it.

Where scales are statistics, a weight's scale follows its own size, and no gradient passes through it:

    W^ = scale m clip(round(v / m), range),        m = mean |v| / (mean |v| at first), an output channel

which is StatsQ (Oscillation-free Quantization, Liu et al., ICML 2023). Differs from the paper: the scale starts where
calibration has it, not at 2 mean |w|; the range holds 0 and has a zero point, the paper's levels lie symmetric around 0 without one.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vitq.affine import QuantizedWeight, highest_code, weight_codes
from vitq.artifacts import Layer
from vitq.calibration.learned import bounded, learned_activation, learned_twin_grid, learned_weight, straight_through
from vitq.checkpoint import Checkpoint
from vitq.graph import Graph, assign, copy, tensor_of
from vitq.graph.dataflow import argument, aten
from vitq.graph.layers import operand_nodes
from vitq.graph.run import Intercept
from vitq.quantizers import Quantizer, TwinGrid, Uniform

RATES = {"steps": 0.01, "gain": 0.003, "bias": 0.01, "range": 0.005, "zero_point": 0.02, "norm_gain": 0.005, "norm_bias": 0.005}
"""Adam's first learning rate of each kind of variable, in its own unit.

With 0.01 for ranges and 0.012 for LayerNorms, held-out images (128 of 1024) came closer and 2000 test images did not: KL 0.0259 instead
of 0.0290, and 0.0405 instead of 0.0378; 3/3, one seed. Without LayerNorms and with softmax outputs fixed: 0.0348 and 0.0437.
"""

_INSIDE = 0.499  # of a step: a weight starts where it rounds to the code that the checkpoint has
_SCALES = (1e-19, 1e19)  # a run that goes astray ends in a checkpoint that can be judged, and is not taken


@dataclass
class Learned:
    """One layer's, LayerNorm's or activation's variables by kind, and what they are changes of."""

    variables: dict[str, Tensor]
    fixed: dict[str, Tensor]


class BlockVariables:
    """The variables of some layers, those of one block or all of them, and the layers' ops under them."""

    def __init__(
        self, floats: Graph, checkpoint: Checkpoint, layers: list[Layer], settled: Collection[str] = (), statistics: bool = False
    ) -> None:
        """Starts at the checkpoint.

        Args:
            floats: the folded float graph that the checkpoint was made from, of the same nodes.
            checkpoint: where learning starts.
            layers: the block's layers.
            settled: activations that an earlier block reads too, and has learned.
            statistics: a weight's scale is not learned but follows the mean of |v| (the module's last equations).
        """
        self._checkpoint, self._layers, self._nodes = checkpoint, layers, floats.nodes
        self._weights = {layer.name: _weight(floats, checkpoint, layer, statistics) for layer in layers if layer.has_weight}
        device = next(checkpoint.graph.module.parameters()).device
        learned = {operand.tensor for layer in layers for operand in layer.activations}
        self._activations = {
            tensor: _activation(quantizer, device)
            for tensor, quantizer in checkpoint.activations.items()
            if tensor in learned and tensor not in settled and isinstance(quantizer, Uniform | TwinGrid)
        }
        self._norms = {node.name: _norm(checkpoint.graph, node) for node in _norm_nodes(floats) if node.name in self._activations}

    @property
    def _all(self) -> dict[str, Learned]:
        return {**self._weights, **self._activations, **{f"norm {node}": learned for node, learned in self._norms.items()}}

    @property
    def activations(self) -> set[str]:
        """The activations that are learned, by `Operand.tensor`."""
        return set(self._activations)

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, one a "kind", each with its "rate"; all variables now want gradients."""
        found: dict[str, list[Tensor]] = {}
        for learned in self._all.values():
            for kind, variable in learned.variables.items():
                found.setdefault(kind, []).append(variable.requires_grad_())
        return [{"params": variables, "lr": RATES[kind], "rate": RATES[kind], "kind": kind} for kind, variables in found.items()]

    def freeze(self) -> None:
        """Lets no variable want gradients any longer."""
        for learned in self._all.values():
            for variable in learned.variables.values():
                variable.requires_grad_(False)

    def leaves(self) -> dict[str, Tensor]:
        """All variables by name, as they are in `groups`."""
        return {f"{kind}:{name}": value for name, learned in self._all.items() for kind, value in learned.variables.items()}

    def tensors(self, copied: bool = False) -> dict[str, Tensor]:
        """All variables by name, detached; as they are now, where `copied`."""
        found = {name: value.detach() for name, value in self.leaves().items()}
        return {name: value.clone() for name, value in found.items()} if copied else found

    def steps(self) -> dict[str, Tensor]:
        """What is rounded of each weight, detached, under the names of `tensors`."""
        return {f"steps:{name}": _steps_and_scale(learned)[0].detach() for name, learned in self._weights.items()}

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the variables to what `tensors` gave."""
        with torch.no_grad():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])

    def intercepts(self) -> dict[str, Intercept]:
        """What runs in the place of the layers' nodes: the layers quantized as the variables have it."""
        layers = {self._nodes[layer.name]: self._intercept(layer) for layer in self._layers}
        return layers | {node: _normalized(learned) for node, learned in self._norms.items()}

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
        x = x.float()  # under autocast it may be bfloat16, whose steps are as coarse as the codes
        if (learned := self._activations.get(tensor)) is None:
            return straight_through(x, self._checkpoint.activations[tensor])
        quantizer = self._checkpoint.activations[tensor]
        if isinstance(quantizer, TwinGrid):
            return learned_twin_grid(x, _scale(learned, "range"), quantizer)
        return learned_activation(x, _scale(learned, "range"), _zero_point(learned, quantizer.bits), quantizer.bits)

    def checkpoint(self) -> Checkpoint:
        """The checkpoint with this block as the variables have it, rounded."""
        before = self._checkpoint
        weights, activations, tensors = dict(before.weights), dict(before.activations), dict[str, Tensor]()
        with torch.no_grad():
            for layer in self._layers:
                if layer.has_weight:
                    learned = self._weights[layer.name]
                    lowest, highest = learned.fixed["lowest"], learned.fixed["highest"]
                    steps, scale = _steps_and_scale(learned)
                    integers = torch.minimum(torch.maximum(steps.round(), lowest), highest)
                    codes = (integers + learned.fixed["zero_point"]).to(torch.uint8)
                    weights[layer.name] = replace(before.weights[layer.name], codes=codes, scale=scale.flatten())
                    tensors[layer.operands[1].tensor] = weights[layer.name].dequantize()
                    tensors[_bias_name(before.graph, layer)] = _weight_and_bias(learned)[1]
            for tensor, learned in self._activations.items():
                activations[tensor] = _rounded(learned, activations[tensor])
            for node in _norm_nodes(before.graph):
                if (learned := self._norms.get(node.name)) is not None:
                    gain, bias = _gain_and_bias(learned)
                    tensors |= {str(argument(node, 2).target): gain, str(argument(node, 3).target): bias}
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


def _weight(floats: Graph, checkpoint: Checkpoint, layer: Layer, statistics: bool) -> Learned:
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
    variables = {"steps": steps.clone(), "bias": torch.zeros_like(bias)}
    fixed = {"scale": scale, "zero_point": zero_point, "lowest": lowest, "highest": highest, "bias": bias, "unit": unit}
    if statistics:
        return Learned(variables, fixed | {"mean": _mean_size(steps)})
    return Learned(variables | {"gain": torch.zeros_like(scale)}, fixed)


def _activation(quantizer: Quantizer, device: torch.device) -> Learned:
    assert isinstance(quantizer, Uniform | TwinGrid)
    scale = torch.tensor(float(quantizer.scale), device=device)
    variables = {"range": torch.zeros_like(scale)}
    if isinstance(quantizer, Uniform):
        variables["zero_point"] = torch.tensor(float(quantizer.zero_point), device=device)
    return Learned(variables, {"scale": scale})


def _rounded(learned: Learned, quantizer: Quantizer) -> Quantizer:
    scale = float(_scale(learned, "range"))
    if isinstance(quantizer, TwinGrid):
        return replace(quantizer, scale=scale)
    return Uniform(scale, int(_zero_point(learned, quantizer.bits).round()), quantizer.bits)


def _norm_nodes(graph: Graph) -> list[Node]:
    """The LayerNorms with a gain and a bias of their own."""

    def own(parameter: Any) -> bool:
        return isinstance(parameter, Node) and parameter.op == "get_attr" and len(parameter.users) == 1

    norms = (node for node in graph.module.graph.nodes if node.target is aten.layer_norm.default)
    return [node for node in norms if len(node.args) > 3 and own(node.args[2]) and own(node.args[3])]


def _norm(graph: Graph, node: Node) -> Learned:
    gain, bias = (tensor_of(graph.module, argument(node, index)).detach() for index in (2, 3))
    return Learned({"norm_gain": torch.zeros_like(gain), "norm_bias": torch.zeros_like(bias)}, {"gain": gain, "bias": bias})


def _gain_and_bias(learned: Learned) -> tuple[Tensor, Tensor]:
    gain, bias = learned.fixed["gain"], learned.fixed["bias"]
    return gain * learned.variables["norm_gain"].exp(), bias + gain.abs() * learned.variables["norm_bias"]


def _normalized(learned: Learned) -> Intercept:
    def intercept(compute: Callable[..., Tensor], x: Tensor, shape: list[int], gain: Tensor, bias: Tensor, *rest: Any) -> Tensor:
        return compute(x, shape, *_gain_and_bias(learned), *rest)

    return intercept


def _scale(learned: Learned, kind: str) -> Tensor:
    return (learned.fixed["scale"] * learned.variables[kind].exp()).clamp(*_SCALES)


def _zero_point(learned: Learned, bits: int) -> Tensor:
    return bounded(learned.variables["zero_point"], 0, highest_code(bits))


def _steps_and_scale(learned: Learned) -> tuple[Tensor, Tensor]:
    """What is rounded of a weight, and what a step of it is worth, (O, 1, ...)."""
    steps = learned.variables["steps"]
    if "gain" in learned.variables:
        return steps, _scale(learned, "gain")
    size = _mean_size(steps.detach()) / learned.fixed["mean"]
    return steps / size, learned.fixed["scale"] * size


def _mean_size(steps: Tensor) -> Tensor:
    """The mean of |v| an output channel, (O, 1, ...), never 0."""
    return steps.abs().mean(tuple(range(1, steps.dim())), keepdim=True).clamp(min=1e-6)


def _weight_and_bias(learned: Learned) -> tuple[Tensor, Tensor]:
    weight = learned_weight(*_steps_and_scale(learned), learned.fixed["lowest"], learned.fixed["highest"])
    return weight, learned.fixed["bias"] + learned.variables["bias"] * learned.fixed["unit"]


def _bias_name(graph: Graph, layer: Layer) -> str:
    return str(argument(graph.layer_node(layer.name), 2).target)
