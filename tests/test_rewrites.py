"""Every rewrite computes the same function: the graphs before and after are run in float64 and compared."""

import copy as copying
from itertools import pairwise

import pytest
import torch
from small_models import FAMILIES, ThreeProjections, Tokens, captured, captured_module, images, randomised
from torch import Tensor, nn

from vitq.graph import Graph, capture, run, values_at
from vitq.ranges import channel_ranges, fold
from vitq.rewrites import (
    ChannelRange,
    convolutions_as_linears,
    fold_batchnorm,
    fold_layernorms,
    foldable_norms,
    give_biases,
    own_weights,
    rewrite,
)


def outputs_in_float64(graph: Graph, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run(copying.deepcopy(graph.module).double(), x.double())


def assert_same_function(ours: Graph, theirs: Graph, tolerance: float = 1e-6) -> None:
    """Rewritten tensors are stored in float32: what is left is their rounding."""
    x = images(3, ours.input_shape[1:], seed=7)
    expected, found = outputs_in_float64(theirs, x), outputs_in_float64(ours, x)
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def count(graph: Graph, name: str) -> int:
    return sum(name in str(node.target) for node in graph.module.graph.nodes if node.op == "call_function")


def in_batches(x: Tensor, size: int = 4) -> list[tuple[Tensor, None]]:
    return [(part, None) for part in x.split(size)]


class ConvNorm(nn.Module):
    def __init__(self, convolution: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x)).flatten(2).mean(2)


# BatchNorm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_batchnorm_after_a_convolution(bias: bool, affine: bool, groups: int):
    norm = nn.BatchNorm2d(6, eps=0.1, affine=affine)
    graph = captured_module(randomised(ConvNorm(nn.Conv2d(3, 6, 3, padding=1, stride=2, groups=groups, bias=bias), norm)))
    folded = fold_batchnorm(graph)
    assert count(graph, "batch_norm") == 1 and count(folded, "batch_norm") == 0
    assert_same_function(folded, graph)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_after_a_linear(affine: bool):
    class LinearNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, affine=affine)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return torch.relu(self.norm(y.flatten(0, 1)).reshape_as(y))

    graph = captured_module(randomised(Tokens(LinearNorm())))
    folded = fold_batchnorm(graph)
    assert count(graph, "batch_norm") == 1 and count(folded, "batch_norm") == 0
    assert_same_function(folded, graph)


@pytest.mark.parametrize("family", ["levit", "visformer"])
def test_batchnorms_of_real_models(family: str):
    _, graph = captured(family)
    folded = fold_batchnorm(graph)
    # levit's all follow a linear or convolution but those of its two heads; visformer's four of the stem and the patch embeddings do,
    # the others stand where a transformer has LayerNorms
    assert (count(graph, "batch_norm"), count(folded, "batch_norm")) == {"levit": (19, 2), "visformer": (10, 6)}[family]
    assert_same_function(folded, graph)


class NotFoldable(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.convolution, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=how != "batch statistics")

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        if self.how == "read by others":
            y = self.norm(y) + y
        elif self.how == "after a nonlinearity":
            y = self.norm(torch.relu(y))
        elif self.how == "permuted":  # channels against rows
            y = self.norm(y.transpose(1, 3))
        elif self.how == "rolled":
            y = self.norm(torch.roll(y, 1, 1))
        elif self.how == "run twice":
            y = self.norm(y) + torch.relu(self.convolution(2 * x))
        else:
            y = self.norm(y)
        return y.flatten(2).mean(2)


@pytest.mark.parametrize("how", ["read by others", "after a nonlinearity", "permuted", "rolled", "run twice", "batch statistics"])
def test_batchnorms_that_cannot_be_folded_stay(how: str):
    graph = captured_module(randomised(NotFoldable(how)), size=10)
    folded = fold_batchnorm(graph)
    assert count(folded, "batch_norm") == 1
    assert_same_function(folded, graph)


def test_a_shared_convolution_folds_once_each_reader_has_its_own():
    graph = captured_module(randomised(NotFoldable("run twice")), size=10)
    folded = fold_batchnorm(own_weights(graph))
    assert count(folded, "batch_norm") == 0
    assert_same_function(folded, graph)


# Convolutions as linears


@pytest.mark.parametrize(
    ("convolution", "size"),
    [
        (nn.Conv2d(3, 5, 4, 4), (16, 16)),
        (nn.Conv2d(3, 5, 4, 4), (18, 15)),  # rows and columns that no patch covers
        (nn.Conv2d(3, 5, (2, 4), (2, 4)), (9, 9)),
        (nn.Conv2d(3, 5, (1, 4), (1, 4)), (5, 9)),
        (nn.Conv2d(3, 5, 2, 2, padding="valid", bias=False), (8, 9)),
        (nn.Conv2d(3, 5, 1), (6, 7)),
        (nn.Conv2d(3, 5, 1, stride=2), (7, 8)),
        (nn.Conv2d(3, 5, 1, stride=(3, 2), bias=False), (8, 7)),
        (nn.Conv2d(3, 5, 1, padding="same"), (6, 7)),
    ],
)
def test_patchwise_convolutions_are_linears(convolution: nn.Conv2d, size: tuple[int, int]):
    graph = captured_module(randomised(ConvNorm(convolution, nn.Sigmoid())), size)
    rewritten = convolutions_as_linears(graph)
    (before,), (after,) = graph.layers, rewritten.layers
    assert (before.op, after.op) == ("convolution", "linear")
    assert (after.name, after.type, after.macs, after.parameters) == (before.name, "patch_embed", before.macs, before.parameters)
    assert_same_function(rewritten, graph)
    for batch in (1, 5):
        x = images(batch, size)
        assert torch.allclose(run(rewritten.module, x), run(graph.module, x), atol=1e-5)


@pytest.mark.parametrize("convolution", [nn.Conv1d(8, 6, 1), nn.Conv1d(8, 6, 1, stride=2), nn.Conv1d(8, 6, 3, stride=3, bias=False)])
def test_convolutions_along_one_axis_are_linears(convolution: nn.Conv1d):
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = convolution

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(x.transpose(1, 2)).transpose(1, 2)

    graph = captured_module(randomised(Tokens(Body())))
    rewritten = convolutions_as_linears(graph)
    assert [layer.op for layer in rewritten.layers] == ["linear", "linear"]
    assert_same_function(rewritten, graph)


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(3, 6, 3, 2), nn.Conv2d(3, 6, 2, 2, padding=1), nn.Conv2d(3, 6, 2, 2, groups=3), nn.Conv2d(3, 6, 2, 2, dilation=2)],
)
def test_other_convolutions_stay(convolution: nn.Conv2d):
    graph = captured_module(ConvNorm(convolution, nn.Identity()))
    assert [layer.op for layer in convolutions_as_linears(graph).layers] == ["convolution"]


def test_a_product_with_a_constant_matrix_is_a_linear():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    graph = captured_module(randomised(Tokens(Body())))
    rewritten = convolutions_as_linears(graph)
    assert [layer.op for layer in rewritten.layers] == ["linear", "linear"]
    assert rewritten.layers[1].operands[1].shape == (5, 8)
    assert_same_function(rewritten, graph)


# Own weights and biases


class Shared(nn.Module):
    """One linear read three times, and a bare parameter that two products share."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(torch.relu(self.linear(torch.relu(self.linear(x)))))
        return nn.functional.linear(torch.relu(nn.functional.linear(x, self.weight)), self.weight)


def test_every_layer_has_its_own_tensors():
    graph = captured_module(randomised(Tokens(Shared())))
    rewritten = own_weights(graph)
    assert len({layer.operands[1].tensor for layer in graph.layers}) == 3
    assert len({layer.operands[1].tensor for layer in rewritten.layers}) == 6
    assert [layer.name for layer in rewritten.layers[:4]] == ["embed", "body.linear", "body.linear.2", "body.linear.3"]
    biases = [rewritten.layer_node(layer.name).args[2].target for layer in rewritten.layers[:4]]
    assert len(set(biases)) == 4
    assert_same_function(rewritten, graph, tolerance=1e-12)
    assert own_weights(rewritten).digest == rewritten.digest


def test_every_layer_with_a_weight_gets_a_bias():
    model = randomised(Tokens(nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 4))))
    graph = captured_module(model)
    rewritten = give_biases(graph)
    for layer in rewritten.layers:
        bias = rewritten.module.get_submodule(layer.name).bias
        assert bias.shape == (layer.channels,)
        assert (torch.count_nonzero(bias) == 0) == (layer.name == "body.0")
    assert_same_function(rewritten, graph, tolerance=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_rewrites_of_real_models(family: str):
    _, graph = captured(family)
    rewritten = rewrite(graph)
    assert_same_function(rewritten, graph, tolerance=1e-5)
    assert rewrite(rewritten).digest == rewritten.digest
    assert sum(layer.macs for layer in rewritten.layers) == sum(layer.macs for layer in graph.layers)
    for layer in rewritten.layers:
        node = rewritten.layer_node(layer.name)
        assert not layer.has_weight or (node.args[2] is not None and len(node.args[1].users) == 1)


# LayerNorm fold


class NormThen(nn.Module):
    """A norm, what happens to its output, and linears that read it."""

    def __init__(self, norm: nn.Module, then=lambda y: y, linears: int = 1, extra=None, bias: bool = True) -> None:
        super().__init__()
        self.norm, self.then, self.extra = norm, then, extra
        self.linears = nn.ModuleList(nn.Linear(8, 6, bias=bias) for _ in range(linears))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = torch.stack([torch.relu(linear(self.then(y))) for linear in self.linears]).sum(0)
        return z if self.extra is None else torch.cat([z, self.extra(y)], -1)


def randomly_folded(graph: Graph, seed: int = 0) -> Graph:
    """The fold for channel ranges drawn at random: exactness does not depend on where they come from."""
    generator = torch.Generator().manual_seed(seed)
    ranges = {}
    for name in foldable_norms(graph):
        shape = next(node for node in graph.module.graph.nodes if node.name == name).args[1]
        low = -torch.rand(shape, generator=generator).mul(4).exp()
        ranges[name] = ChannelRange(low, low + torch.rand(shape, generator=generator).mul(5).exp())
    return fold_layernorms(graph, ranges)


def pad(y: Tensor) -> Tensor:
    return nn.functional.pad(y, (0, 0, 0, 3))


def windows(y: Tensor) -> Tensor:
    return torch.roll(y, 3, 1).unflatten(1, (4, 4)).flip(1).flatten(0, 1)


FOLDABLE = {
    "plain": (NormThen(nn.LayerNorm(8)), True),
    "no affine": (NormThen(nn.LayerNorm(8, elementwise_affine=False)), True),
    "no shift of its own": (NormThen(nn.LayerNorm(8, bias=False)), True),
    "several readers": (NormThen(nn.LayerNorm(8), linears=3), True),
    "readers without bias": (NormThen(nn.LayerNorm(8), linears=2, bias=False), True),
    "through windows": (NormThen(nn.LayerNorm(8), then=lambda y: windows(y).unflatten(0, (-1, 4)).flatten(1, 2)), True),
    "a part of the tokens": (NormThen(nn.LayerNorm(8), then=lambda y: y[:, 3:]), True),
    "padded": (NormThen(nn.LayerNorm(8), then=pad, linears=2), False),
    "rms": (NormThen(nn.RMSNorm(8)), False),
    "rms without affine": (NormThen(nn.RMSNorm(8, elementwise_affine=False)), False),
}
NOT_FOLDABLE = {
    "read by something else": NormThen(nn.LayerNorm(8), extra=torch.tanh),
    "read by the residual": NormThen(nn.LayerNorm(8), extra=lambda y: y),
    "channels swapped with tokens": NormThen(nn.LayerNorm(8), then=lambda y: y[:, :8].transpose(1, 2)),
    "channels rolled": NormThen(nn.LayerNorm(8), then=lambda y: torch.roll(y, 1, 2)),
    "channels shuffled": NormThen(nn.LayerNorm(8), then=lambda y: y.unflatten(2, (2, 4)).transpose(2, 3).flatten(2)),
    "over two axes": NormThen(nn.LayerNorm([16, 8])),
    "before a convolution": NormThen(nn.LayerNorm(8), extra=nn.Conv1d(16, 16, 3, padding=1)),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_folded_layernorms_compute_the_same(case: str):
    body, shiftable = FOLDABLE[case]
    graph = captured_module(randomised(Tokens(body)))
    assert list(foldable_norms(graph).values()) == [shiftable]
    folded = randomly_folded(graph)
    assert_same_function(folded, graph, tolerance=1e-5)
    node, before = (next(n for n in g.module.graph.nodes if n.name == next(iter(foldable_norms(graph)))) for g in (folded, graph))
    x = images(2, 8)
    assert not torch.allclose(values_at(folded.module, x, [node.name])[node.name], values_at(graph.module, x, [before.name])[before.name])


@pytest.mark.parametrize("case", NOT_FOLDABLE)
def test_layernorms_whose_channels_do_not_meet_linears_alone_stay(case: str):
    graph = captured_module(randomised(Tokens(NOT_FOLDABLE[case])))
    assert foldable_norms(graph) == {}
    assert fold_layernorms(graph, {}).digest == graph.digest


def test_part_of_the_channels_alone_is_no_reader():
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.norm(x)[..., :5])

    assert foldable_norms(captured_module(Tokens(Body()))) == {}


def test_padding_leaves_the_shift_out():
    graph = captured_module(randomised(Tokens(FOLDABLE["padded"][0])))
    (norm,) = foldable_norms(graph)
    folded = randomly_folded(graph)
    gain, shift = ([getattr(g.module.body.norm, part) for part in ("weight", "bias")] for g in (graph, folded))
    assert torch.allclose(gain[1] / gain[0], shift[1] / shift[0], rtol=1e-5)  # scaled alike: nothing was added to beta
    assert norm


@pytest.mark.parametrize("family", ["vit", "swin", "cait"])
def test_folded_real_models_compute_the_same(family: str):
    graph = rewrite(captured(family)[1])
    x = images(6, graph.input_shape[1:], seed=3)
    folded = fold_layernorms(graph, channel_ranges(graph, foldable_norms(graph), in_batches(x)))
    norms = sum(str(node.target) == "aten.layer_norm.default" for node in graph.module.graph.nodes)
    left = {"vit": 0, "swin": 2, "cait": 0}[family]  # swin's patches' own norm, which the residual stream reads, and that before pooling
    assert norms - len(foldable_norms(graph)) == left
    assert_same_function(folded, graph, tolerance=1e-5)


def test_every_channel_has_the_same_range_after_the_fold():
    graph = rewrite(captured("swin")[1])
    batches = in_batches(images(6, graph.input_shape[1:], seed=3))
    before = channel_ranges(graph, foldable_norms(graph), batches)
    after = channel_ranges(fold_layernorms(graph, before), before, batches)
    for name, shiftable in foldable_norms(graph).items():
        spread = (before[name].high - before[name].low).std() / (before[name].high - before[name].low).mean()
        assert spread > 0.2
        low, high = after[name].low, after[name].high
        if shiftable:
            assert torch.allclose(low, low.mean().expand_as(low), rtol=1e-4)
            assert torch.allclose(high, high.mean().expand_as(high), rtol=1e-4)
        else:
            widest = torch.maximum(high, -low)
            assert torch.allclose(widest, widest.mean().expand_as(widest), rtol=1e-4)


def test_folding_twice_changes_nothing():
    graph = rewrite(captured("vit")[1])
    batches = in_batches(images(6, 32, seed=3))
    once, _ = fold(graph, batches)
    twice, _ = fold(once, batches)
    assert once.digest == twice.digest
    for name, tensor in once.module.state_dict().items():
        assert torch.allclose(twice.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5), name


def test_a_constant_channel_keeps_its_place():
    body = NormThen(nn.LayerNorm(8))
    model = randomised(Tokens(body))
    with torch.no_grad():
        body.norm.weight[2] = 0
    graph = captured_module(model)
    folded, _ = fold(graph, in_batches(images(4, 8)))
    assert all(bool(tensor.isfinite().all()) for tensor in folded.module.state_dict().values())
    assert float(folded.module.body.norm.bias[2]) == pytest.approx(0, abs=1e-5)
    assert_same_function(folded, graph, tolerance=1e-5)


def test_a_rescaled_checkpoint_gives_the_same_folded_graph():
    plain = randomised(Tokens(nn.Sequential(ThreeProjections(), NormThen(nn.LayerNorm(8), linears=2))))
    rescaled = copying.deepcopy(plain)
    generator = torch.Generator().manual_seed(5)
    attention, after = rescaled.body
    with torch.no_grad():
        for norm, linears in ((attention.norm, [attention.query, attention.key, attention.value]), (after.norm, list(after.linears))):
            r = torch.randn(8, generator=generator).mul(1.5).exp()
            norm.weight *= r
            norm.bias *= r
            for linear in linears:
                linear.weight /= r
    batches = in_batches(images(8, 8, seed=2))
    (ours, ranges), (theirs, other_ranges) = (fold(rewrite(captured_module(model)), batches) for model in (plain, rescaled))
    assert ours.digest == theirs.digest
    assert not torch.allclose(plain.body[0].query.weight, rescaled.body[0].query.weight, rtol=0.1)
    for name, tensor in ours.module.state_dict().items():
        assert torch.allclose(theirs.module.state_dict()[name], tensor, rtol=1e-5, atol=1e-5), name
    for name, histogram in ranges.items():
        assert other_ranges[name].low == pytest.approx(histogram.low, abs=1e-4)
        assert other_ranges[name].high == pytest.approx(histogram.high, abs=1e-4)


def test_the_structure_of_a_fold_can_be_made_without_ranges():
    graph = rewrite(captured("vit")[1])
    folded, _ = fold(graph, in_batches(images(4, 32)))
    empty = fold_layernorms(graph)
    assert empty.digest == folded.digest
    shapes = [{name: tensor.shape for name, tensor in g.module.state_dict().items()} for g in (empty, folded)]
    assert shapes[0] == shapes[1]
    assert_same_function(empty, graph, tolerance=1e-12)


def test_rewrites_leave_the_graph_that_they_were_given():
    model, graph = captured("vit")
    before = {name: tensor.clone() for name, tensor in graph.module.state_dict().items()}
    steps = [graph, rewrite(graph)]
    steps.append(randomly_folded(steps[-1]))
    after = graph.module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(a.module is not b.module for a, b in pairwise(steps))
    assert capture(model, graph.input_shape).digest == graph.digest
