"""Attention's channels in one form: exact in float, claimed only where it is provable, and the same whatever a checkpoint's scales were."""

import copy as copying
import math

import pytest
import rescaled_checkpoint
import torch
from small_models import FAMILIES, ThreeProjections, Tokens, captured, captured_module, images, randomised, timm_model
from torch import Tensor, nn

from vitq.allocation import allocate
from vitq.artifacts import ModelSpec, Profile
from vitq.graph import Graph, capture, run
from vitq.importance import METRICS, MetricOptions, Subject
from vitq.ranges import channel_ranges, fold
from vitq.rewrites import ChannelRange, couplings, rescale_attention, rewrite
from vitq.rewrites.attention import Coupling, Side


def in_batches(x: Tensor, size: int = 4) -> list[tuple[Tensor, None]]:
    return [(part, None) for part in x.split(size)]


def output(graph: Graph, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run(copying.deepcopy(graph.module).double(), x.double())


def rows_of(found: list[Coupling]) -> set[str]:
    return {side.linear for coupling in found for side in (coupling.first, coupling.second) if not side.columns}


def random_ranges(graph: Graph, found: list[Coupling]) -> dict[str, ChannelRange]:
    nodes = {node.name: node for node in graph.module.graph.nodes}
    generator = torch.Generator().manual_seed(0)
    sizes = {name: torch.randn(nodes[name].meta["val"].shape[-1], generator=generator).mul(2).exp() for name in sorted(rows_of(found))}
    return {name: ChannelRange(-size, 0.5 * size) for name, size in sizes.items()}


# queries with keys, values with projections; levit has a hardswish before its projection
COUPLED = {"vit": (2, 2), "swin": (3, 3), "levit": (3, 0), "cait": (4, 4), "pvt": (4, 4), "visformer": (2, 2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_by_any_ranges_computes_the_same(family: str):
    graph = rewrite(captured(family)[1])
    found = couplings(graph)
    assert (sum(not c.second.columns for c in found), sum(c.second.columns for c in found)) == COUPLED[family]
    rescaled = rescale_attention(graph, found, random_ranges(graph, found))
    x = images(3, graph.input_shape[1:], seed=7)
    expected, moved = output(graph, x), output(rescaled, x)
    assert float((moved - expected).abs().max() / expected.abs().max()) < 1e-5
    assert rescaled.digest == graph.digest
    weights = [g.module.state_dict() for g in (graph, rescaled)]
    changed = [name for name in weights[0] if not torch.allclose(weights[0][name], weights[1][name], rtol=0.1)]
    assert len(changed) >= len(found)


class Attention(nn.Module):
    """Attention of two heads with one of the things that stand in a rescaling's way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.position = nn.LayerNorm(4), nn.Linear(4, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        if self.kind == "normalised queries":
            q = self.norm(q)
        if self.kind == "rotary embedding":
            q, k = (part * 0.8 + torch.cat([-part[..., 2:], part[..., :2]], -1) * 0.6 for part in (q, k))
        scores = q @ k.transpose(-2, -1)
        if self.kind == "positions from queries":
            scores = scores + self.position(q)
        if self.kind == "over channels":
            y = v @ (q.transpose(-2, -1) @ k / 16).softmax(-1)
        else:
            y = (scores / math.sqrt(4)).softmax(-1) @ v
        if self.kind == "values in a sum":
            y = y + v
        y = y.transpose(1, 2).flatten(2)
        if self.kind == "activation before the projection":
            y = torch.tanh(y)
        if self.kind == "convolved values":
            y = self.out(y) + self.convolution(v.transpose(1, 2).flatten(2))
        elif self.kind == "read twice":
            y = self.out(y) + y
        else:
            y = self.out(y)
        return x + y


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", {("query", "key"), ("value", "out")}),
        ("normalised queries", {("value", "out")}),
        ("rotary embedding", {("value", "out")}),
        ("positions from queries", {("value", "out")}),
        ("over channels", set()),
        ("values in a sum", {("query", "key")}),
        ("activation before the projection", {("query", "key")}),
        ("convolved values", {("query", "key")}),
        ("read twice", {("query", "key")}),
    ],
)
def test_only_what_is_provable_is_coupled(kind: str, expected: set[tuple[str, str]]):
    graph = rewrite(captured_module(randomised(Tokens(Attention(kind)))))
    found = couplings(graph)
    layer_of = {node: layer.removeprefix("body.") for layer, node in graph.nodes.items()}
    assert {(layer_of[c.first.linear], layer_of[c.second.linear]) for c in found} == expected
    rescaled = rescale_attention(graph, found, random_ranges(graph, found))
    x = images(2, 8)
    assert torch.allclose(output(rescaled, x), output(graph, x), rtol=1e-5, atol=1e-6)


def test_channels_of_the_two_heads_meet_their_own():
    graph = rewrite(captured("vit")[1])
    qk, value = couplings(graph)[:2]
    assert torch.equal(qk.second.channels - qk.first.channels, torch.full((64,), 64))
    assert sorted(qk.first.channels.tolist()) == list(range(64))
    assert torch.equal(value.first.channels - 128, value.second.channels)


def test_both_sides_measure_the_same_afterwards():
    graph = rewrite(captured("swin")[1])
    found, batches = couplings(graph), in_batches(images(6, 40, seed=3))
    before = channel_ranges(graph, rows_of(found), batches)
    rescaled = rescale_attention(graph, found, before)
    after = channel_ranges(rescaled, rows_of(found), batches)

    def size(g: Graph, ranges: dict[str, ChannelRange], side: Side) -> Tensor:
        if side.columns:
            layer = next(name for name, node in g.nodes.items() if node == side.linear)
            return g.module.get_parameter(f"{layer}.weight").norm(dim=0)[side.channels]
        return torch.maximum(ranges[side.linear].high, -ranges[side.linear].low)[side.channels]

    for coupling in found:
        first, second = size(rescaled, after, coupling.first), size(rescaled, after, coupling.second)
        assert torch.allclose(first, second, rtol=1e-4)
        product = size(graph, before, coupling.first) * size(graph, before, coupling.second)
        assert torch.allclose(first * second, product, rtol=1e-4)


def test_a_dead_channel_keeps_its_scale():
    model = randomised(Tokens(ThreeProjections()))
    with torch.no_grad():
        model.body.value.weight[3] = 0
        model.body.value.bias[3] = 0
        model.body.key.weight[2] = 0
        model.body.key.bias[2] = 0
        model.body.out.weight[:, 1] = 0
    graph = rewrite(captured_module(model))
    folded, _ = fold(graph, in_batches(images(4, 8)))
    assert all(bool(tensor.isfinite().all()) for tensor in folded.module.state_dict().values())
    assert torch.allclose(output(folded, images(2, 8)), output(graph, images(2, 8)), rtol=1e-5, atol=1e-6)
    found = couplings(graph)
    rescaled = rescale_attention(graph, found, channel_ranges(graph, rows_of(found), in_batches(images(4, 8))))
    scale = rescaled.module.get_parameter("body.value.bias") / graph.module.get_parameter("body.value.bias")
    assert scale[1] == 1 and not torch.allclose(scale[[0, 2]], torch.ones(2), rtol=0.01)


def profile_of(model: nn.Module, metrics: list[str]) -> Profile:
    graph = rewrite(capture(model, (3, 32, 32)))
    batches = in_batches(images(16, 32, seed=5), 8)
    folded, histograms = fold(graph, batches)
    subject = Subject(folded, histograms, batches, (2, 3, 4, 6, 8), 10, 0, MetricOptions(), None)
    spec = ModelSpec(architecture="vit", num_classes=10, data_config={"input_size": [3, 32, 32]}, graph_digest=folded.digest)
    costs = {name: METRICS[name](subject) for name in metrics}
    return Profile(model=spec, layers=folded.layers, costs=costs, rest_bytes=0)


def test_an_exactly_rescaled_checkpoint_gets_the_same_profile_and_plan():
    plain = timm_model("vit")
    other = rescaled_checkpoint.rescaled(plain, seed=11)
    x = images(4, 32)
    with torch.no_grad():
        assert torch.allclose(plain(x), other(x), rtol=1e-4, atol=1e-5)
    metrics = ["output-fisher", "sensitivity", "hawq-v2", "sqnr", "weight-mse"]
    ours, theirs = profile_of(plain, metrics), profile_of(other, metrics)
    for metric in metrics:
        for layer, costs in ours.costs[metric].tied.items():
            assert theirs.costs[metric].tied[layer] == pytest.approx(costs, rel=0.1, abs=1e-7), (metric, layer)
    for average in ("3.0", "4.0"):
        assert allocate(ours, [average]).plan.layers == allocate(theirs, [average]).plan.layers
