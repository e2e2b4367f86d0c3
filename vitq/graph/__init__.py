"""The one graph: a timm model captured by torch.export as ATen ops, and what is found in it.

`capture` exports the model with a dynamic batch, drops guards, dropout and in-place ops and folds what depends on no image. `analyse`
finds the blocks and the layers; every rewrite ends with it. A Graph is a value: edits make a new one, which shares the tensors they
leave alone.
"""

import hashlib
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from vitq.artifacts import Layer
from vitq.errors import InputError
from vitq.graph.blocks import Block, find_blocks
from vitq.graph.dataflow import assign, aten, tensor_of
from vitq.graph.layers import find_layers
from vitq.graph.run import advance, run, start, values_at
from vitq.graph.simplify import simplify

__all__ = ["Block", "Graph", "advance", "analyse", "assign", "capture", "copy", "run", "start", "tensor_of", "values_at"]

_FUSED_ATTENTION = {aten.scaled_dot_product_attention.default}


@dataclass(frozen=True)
class Graph:
    """A captured model.

    `module` takes images (B, 3, H, W) float32, any B, and returns one tensor. `layers` are in the order of the graph, `nodes` maps a
    layer's name to the name of its fx node, `blocks` are in order. `input_shape` is (3, H, W).
    """

    module: GraphModule
    input_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]
    nodes: dict[str, str]
    blocks: tuple[Block, ...]

    @property
    def digest(self) -> str:
        """Digest of the graph's ops, layer names and shapes; parameters' values do not enter."""
        lines = [f"{node.op} {node.target} {_shape_text(node)}" for node in self.module.graph.nodes if node.op == "call_function"]
        lines += [f"{layer.name} {layer.operands}" for layer in self.layers]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def stretches(self) -> list[tuple[str, str | None]]:
        """For `advance`, block by block: the name of each block's first node and of the node to stop before, None at the end."""
        firsts = [block.first for block in self.blocks]
        return list(zip(firsts, [*firsts[1:], None], strict=True))

    def layer_node(self, layer: str) -> Node:
        """The fx node of a layer."""
        wanted = self.nodes[layer]
        return next(node for node in self.module.graph.nodes if node.name == wanted)

    def unfused(self) -> list[str]:
        """Names of attention ops that are still fused: their matmuls are no layers and stay float."""
        return [node.name for node in self.module.graph.nodes if node.target in _FUSED_ATTENTION]


def capture(model: nn.Module, input_shape: tuple[int, int, int], device: str = "cpu") -> Graph:
    """Captures a model built with unfused attention.

    Args:
        model: a timm model that maps (B, 3, H, W) to one tensor.
        input_shape: (3, H, W).
        device: where the graph's parameters and constants live.

    Raises:
        InputError: torch.export refuses the model, it returns several tensors, or it works for one batch size only.
    """
    model = model.eval().to(device)
    example = torch.zeros(2, *input_shape, device=device)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attribute caches that timm fills while it is traced; they are folded below
            exported = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
            module = exported.module()
    except Exception as error:  # torch.export raises many kinds; each means that this model cannot be captured
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        name = type(model).__name__
        raise InputError(f"torch.export cannot capture {name}: {reason}; vitq needs one graph for any batch size") from error
    module = simplify(module, type(model).__name__)
    return analyse(module, input_shape)


def analyse(module: GraphModule, input_shape: tuple[int, int, int]) -> Graph:
    """Finds blocks and layers of a captured or rewritten graph; every node gets its shape at a batch of one image."""
    module.graph.lint()
    module.recompile()
    (placeholder,) = (node for node in module.graph.nodes if node.op == "placeholder")
    device = placeholder.meta["val"].device
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        FakeTensorProp(module, mode).propagate(torch.zeros(1, *input_shape, device=device))
    blocks, block_of = find_blocks(module)
    layers, nodes = find_layers(module, block_of)
    return Graph(module, input_shape, layers, nodes, blocks)


def copy(graph: Graph) -> GraphModule:
    """A module to edit: its own nodes and its own table of tensors; the tensors themselves are shared."""
    nodes = torch.fx.Graph()
    values: dict[Node, Node] = {}
    result = nodes.graph_copy(graph.module.graph, values)
    nodes.output(result)
    return GraphModule(graph.module, nodes)


def _shape_text(node: Node) -> str:
    value = node.meta.get("val")
    return str(tuple(value.shape)) if isinstance(value, Tensor) else ""
