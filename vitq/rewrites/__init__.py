"""Exact float rewrites of the captured graph, one file each; each takes a Graph and returns a new one.

`prepare` makes the graph that everything later starts from; folding LayerNorms and rescaling attention need the channels' ranges and
come with calibration.
"""

from vitq.artifacts import ModelSpec
from vitq.graph import Graph, capture
from vitq.models import LoadedModel
from vitq.rewrites.as_linear import convolutions_as_linears
from vitq.rewrites.attention import couplings, rescale_attention
from vitq.rewrites.batchnorm import fold_batchnorm
from vitq.rewrites.biases import give_biases
from vitq.rewrites.channel_range import ChannelRange
from vitq.rewrites.layernorm import fold_factors, fold_layernorms, foldable_norms, norm_readers
from vitq.rewrites.own_weights import own_weights

__all__ = [
    "ChannelRange", "convolutions_as_linears", "couplings", "fold_batchnorm", "fold_factors", "fold_layernorms", "foldable_norms",
    "give_biases", "norm_readers", "own_weights", "prepare", "rescale_attention", "rewrite",
]  # fmt: skip


def prepare(model: LoadedModel, device: str = "cpu") -> tuple[Graph, ModelSpec]:
    """The captured and rewritten graph of a model, and what a later stage needs to make it again.

    Raises:
        InputError: the model cannot be captured.
    """
    channels, height, width = model.data_config["input_size"]
    graph = rewrite(capture(model.module, (channels, height, width), device))
    spec = ModelSpec(
        architecture=model.architecture,
        arguments=model.arguments,
        num_classes=model.num_classes,
        data_config=model.data_config,
        label_names=model.label_names,
        graph_digest=graph.digest,
    )
    return graph, spec


def rewrite(graph: Graph) -> Graph:
    """The graph after every rewrite that needs no images: own weights, BatchNorm folded, patchwise convolutions as linears, biases."""
    return give_biases(convolutions_as_linears(fold_batchnorm(own_weights(graph))))
