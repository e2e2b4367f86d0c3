"""Relevance propagation: each rule against double loops over a dense matrix, and what holds for whole networks."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from small_models import FAMILIES, NormThenLinear, ThreeProjections, Tokens, captured, captured_module, images, randomised, timm_model
from torch import Tensor, nn

from vitq.errors import InputError
from vitq.graph import Graph, capture, tensor_of, values_at
from vitq.graph.dataflow import aten
from vitq.importance import METRICS, MetricOptions, Subject
from vitq.importance.lrp import lrp, start_at
from vitq.importance.relevance import RULES, propagate
from vitq.importance.relevance.gamma import GAMMA
from vitq.importance.relevance.shared import MOVING
from vitq.importance.relevance.step import EPSILON, Step, image_axis
from vitq.models import build
from vitq.rewrites import rewrite


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step_of(op: Callable, arguments: tuple, places: tuple[int, ...] = (0,), images: int = 1, on_pixels: bool = False, **keywords) -> Step:
    """An op with values, those at `places` being the ones that carry relevance."""

    def compute(*inputs):
        given = list(arguments)
        for place, value in zip(places, inputs, strict=True):
            given[place] = value
        return op(*given, **keywords)

    inputs = tuple(arguments[place] for place in places)
    return Step("op", op, arguments, keywords, places, inputs, op(*arguments, **keywords), compute, images, 0, on_pixels)


# Products, against the equations written as loops


def naive_alpha1(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    for k in range(len(r)):
        positive = [max(float(w[k, j] * x[j]), 0.0) for j in range(len(x))]
        for j in range(len(x)):
            if sum(positive) > 0:
                found[j] += positive[j] / sum(positive) * r[k]
    return found


def naive_epsilon(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    for k in range(len(r)):
        y = sum(float(w[k, j] * x[j]) for j in range(len(x))) + float(b[k])
        for j in range(len(x)):
            found[j] += w[k, j] * x[j] / (y + math.copysign(EPSILON, y)) * r[k]
    return found


def naive_gamma(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    for k in range(len(r)):
        terms = [float(w[k, j] * x[j]) for j in range(len(x))]
        y = sum(terms) + float(b[k])
        grown = [term * (1 + GAMMA) if term * y > 0 else term for term in terms]
        for j in range(len(x)):
            found[j] += grown[j] / (sum(grown) + float(b[k])) * r[k]
    return found


def naive_bounded(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    low, high = float(x.min()), float(x.max())
    for k in range(len(r)):
        terms = [float(w[k, j]) * (float(x[j]) - (low if w[k, j] > 0 else high)) for j in range(len(x))]
        for j in range(len(x)):
            found[j] += terms[j] / sum(terms) * r[k]
    return found


NAIVE = {"chefer": naive_alpha1, "epsilon": naive_epsilon, "gamma": naive_gamma, "attnlrp": naive_epsilon}


@pytest.mark.parametrize("family", RULES)
def test_linear_is_the_double_loop(family: str):
    x, w, b, r = normal(5), normal(4, 5, seed=1), normal(4, seed=2), normal(4, seed=3)
    (found,) = RULES[family][aten.linear.default](step_of(aten.linear.default, (x[None], w, b)), r[None])
    assert torch.allclose(found[0], NAIVE[family](x, w, b, r), rtol=1e-5)


@pytest.mark.parametrize("family", RULES)
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_is_the_double_loop_over_its_matrix(family: str, groups: int):
    x, w, b = normal(1, 4, 4, 3), normal(2, 4 // groups, 3, 2, seed=1), normal(2, seed=2)
    step = step_of(aten.conv2d.default, (x, w, b, [2, 1], [1, 0], [1, 1], groups))
    basis = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape[1:])
    matrix = aten.conv2d.default(basis, w, None, [2, 1], [1, 0], [1, 1], groups).flatten(1).T
    r = normal(*step.output.shape, seed=3)
    bias = b.repeat_interleave(step.output[0, 0].numel())
    (found,) = RULES[family][aten.conv2d.default](step, r)
    assert torch.allclose(found.flatten(), NAIVE[family](x.flatten(), matrix, bias, r.flatten()), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", RULES)
def test_matmul_with_a_constant_is_linear_in_the_other(family: str):
    x, w, r = normal(5), normal(4, 5, seed=1), normal(4, seed=3)
    (found,) = RULES[family][aten.matmul.default](step_of(aten.matmul.default, (w, x[:, None]), (1,)), r[:, None])
    assert torch.allclose(found[:, 0], NAIVE[family](x, w, torch.zeros(4), r), rtol=1e-5)


def test_pixels_are_bounded_by_the_image():
    x, w, r = normal(5), normal(4, 5, seed=1), normal(4, seed=3)
    (found,) = RULES["chefer"][aten.linear.default](step_of(aten.linear.default, (x[None], w, None), on_pixels=True), r[None])
    assert torch.allclose(found[0], naive_bounded(x, w, torch.zeros(4), r), rtol=1e-6)
    assert torch.allclose(found.sum(), r.sum(), rtol=1e-6)


@pytest.mark.parametrize("family", RULES)
def test_a_matmul_of_two_inputs_gives_half_to_each_term_of_each(family: str):
    a, b, r = normal(3, 4), normal(4, 2, seed=1), normal(3, 2, seed=2)
    to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
    for i in range(3):
        for p in range(2):
            y = sum(float(a[i, j] * b[j, p]) for j in range(4))
            for j in range(4):
                to_a[i, j] += a[i, j] * b[j, p] * r[i, p] / (2 * y)
                to_b[j, p] += a[i, j] * b[j, p] * r[i, p] / (2 * y)
    found = RULES[family][aten.matmul.default](step_of(aten.matmul.default, (a, b), (0, 1)), r)
    assert torch.allclose(found[0], to_a, rtol=1e-4) and torch.allclose(found[1], to_b, rtol=1e-4)


# Sums, pools, softmax, factors


def test_chefers_sum_keeps_each_images_total():
    a, b, r = normal(2, 3), normal(2, 3, seed=1), normal(2, 3, seed=2)
    found = RULES["chefer"][aten.add.Tensor](step_of(aten.add.Tensor, (a, b), (0, 1), images=2), r)
    for n in range(2):
        shares = [[float(term[n, i] * r[n, i] / (a[n, i] + b[n, i])) for i in range(3)] for term in (a, b)]
        whole = abs(sum(shares[0])) + abs(sum(shares[1]))
        for share, part in zip(shares, found, strict=True):
            total = abs(sum(share)) / whole * float(r[n].sum())
            assert part[n].tolist() == pytest.approx([value * total / sum(share) for value in share], rel=1e-6)
        assert float(found[0][n].sum() + found[1][n].sum()) == pytest.approx(float(r[n].sum()), rel=1e-6)


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_difference_is_a_sum_with_the_negative(alpha: int):
    a, b, r = normal(1, 3), normal(1, 3, seed=1), normal(1, 3, seed=2)
    for family, rules in RULES.items():
        expected = rules[aten.add.Tensor](step_of(aten.add.Tensor, (a, -alpha * b), (0, 1)), r)
        found = rules[aten.sub.Tensor](step_of(aten.sub.Tensor, (a, b), (0, 1), alpha=alpha), r)
        assert all(torch.allclose(x, y) for x, y in zip(found, expected, strict=True)), family


def test_constants_of_a_sum_absorb_their_share_and_masks_nothing():
    x, r = normal(1, 4), normal(1, 4, seed=2)
    mask = torch.tensor([[0.0, 0.0, -math.inf, 0.0]], dtype=torch.float64)
    for family, rules in RULES.items():
        (masked,) = rules[aten.add.Tensor](step_of(aten.add.Tensor, (x, mask)), r)
        assert masked.isfinite().all() and masked[0, 2] == 0, family
        (half,) = rules[aten.add.Tensor](step_of(aten.add.Tensor, (x, x)), r)
        assert torch.allclose(half, r / 2, rtol=1e-4), family
    (whole,) = RULES["chefer"][aten.add.Tensor](step_of(aten.add.Tensor, (x, 3.0)), r)
    assert torch.equal(whole, r)


@pytest.mark.parametrize("family", ["chefer", "gamma"])
def test_a_mean_gives_to_the_terms_of_its_own_sign(family: str):
    x, r = normal(6, 3), normal(3, seed=1)
    (found,) = RULES[family][aten.mean.dim](step_of(aten.mean.dim, (x, [0])), r)
    for k in range(3):
        own = [float(value) if value * x[:, k].mean() > 0 else 0.0 for value in x[:, k]]
        assert found[:, k].tolist() == pytest.approx([value / sum(own) * float(r[k]) for value in own], rel=1e-4)


@pytest.mark.parametrize("family", RULES)
def test_windows_that_overlap_share_what_their_sum_has(family: str):
    x, r = normal(1, 4, 9), normal(1, 1, 4, 4, seed=1)  # nine windows of 2 x 2, each a step from the next
    (found,) = RULES[family][aten.col2im.default](step_of(aten.col2im.default, (x, [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])), r)
    assert torch.allclose(found.sum(), r.sum(), rtol=1e-4)
    assert float(found[0, 0, 0]) == pytest.approx(float(r[0, 0, 0, 0]), rel=1e-4)  # the corner has one window alone


def test_attnlrps_softmax_is_the_first_order_expansion():
    x, r = normal(3, 4), normal(3, 4, seed=1)
    (found,) = RULES["attnlrp"][aten.softmax.int](step_of(aten.softmax.int, (x, -1)), r)
    for row in range(3):
        s = x[row].softmax(0)
        for i in range(4):
            expected = sum(s[j] * (float(i == j) - s[i]) * x[row, i] * r[row, j] / s[j] for j in range(4))
            assert torch.allclose(found[row, i], expected)


def test_factors_share_in_halves_and_constants_take_nothing():
    a, b, r = normal(2, 3), normal(2, 1, seed=1), normal(2, 3, seed=2)
    for family, rules in RULES.items():
        to_a, to_b = rules[aten.mul.Tensor](step_of(aten.mul.Tensor, (a, b), (0, 1)), r)
        assert torch.allclose(to_a, r / 2) and torch.allclose(to_b, r.sum(1, keepdim=True) / 2), family
        for op, arguments, places in ((aten.mul.Tensor, (a, b), (0,)), (aten.div.Tensor, (a, b), (0,)), (aten.mul.Tensor, (a, 2.0), (0,))):
            (found,) = rules[op](step_of(op, arguments, places), r)
            assert torch.equal(found, r), family
        to_a, to_b = rules[aten.div.Tensor](step_of(aten.div.Tensor, (a, b), (0, 1)), r)
        assert torch.equal(to_a, r) and not to_b.any(), family


# Ops that move values, against a list of where each number went

MOVES: list[tuple] = [
    (aten.permute.default, [0, 2, 1]), (aten.transpose.int, 1, 2), (aten.reshape.default, [2, 12]), (aten.view.default, [2, 2, 2, 3]),
    (aten.slice.Tensor, 1, 1, 4, 2), (aten.select.int, 1, 2), (aten.roll.default, [1, -1], [1, 2]), (aten.flip.default, [1]),
    (aten.pad.default, [1, 2], "constant", -1.0), (aten.constant_pad_nd.default, [0, 1, 1, 0], -1.0), (aten.repeat.default, [1, 2, 1]),
    (aten.unsqueeze.default, 1), (aten.flatten.using_ints, 1, 2), (aten.unfold.default, 1, 2, 1), (aten.contiguous.default,),
    (aten.index_select.default, 1, torch.tensor([3, 0, 3])), (aten.index.Tensor, [None, torch.tensor([1, 1, 2])]),
    (aten.gather.default, 1, torch.tensor([[[1, 0, 2]], [[0, 0, 3]]])), (aten.pixel_shuffle.default, 2),
    (aten.masked_fill.Scalar, torch.arange(24).reshape(2, 4, 3) % 5 == 0, -1.0), (aten.repeat_interleave.self_int, 2, 1),
    (aten.expand.default, [5, 2, 4, 3]),
    (aten.reflection_pad1d.default, [1, 1]), (aten.upsample_nearest2d.vec, None, [2.0, 3.0]), (aten.amax.default, [1]),
    (aten.max_pool1d.default, [2], [2]),
]  # fmt: skip


@pytest.mark.parametrize("move", MOVES, ids=lambda move: str(move[0]))
def test_moved_values_take_their_relevance_along(move: tuple):
    op, *rest = move
    shape = (1, 4, 2, 3) if op in (aten.pixel_shuffle.default, aten.upsample_nearest2d.vec) else (2, 4, 3)
    numbers = torch.arange(24, dtype=torch.float64).reshape(shape)
    step = step_of(op, (numbers, *rest))
    relevance = normal(*step.output.shape)
    expected = torch.zeros(24, dtype=torch.float64)
    for number, value in zip(step.output.flatten().tolist(), relevance.flatten().tolist(), strict=True):
        if number >= 0:  # -1 was put in
            expected[int(number)] += value
    assert op in MOVING
    for rules in RULES.values():
        (found,) = rules[op](step, relevance)
        assert torch.allclose(found.flatten(), expected)


@pytest.mark.parametrize(
    ("op", "rest"), [(aten.unbind.int, (1,)), (aten.split_with_sizes.default, ([1, 3], 1)), (aten.chunk.default, (2, 1))]
)
def test_parts_take_their_relevance_back(op: Callable, rest: tuple):
    numbers = torch.arange(24, dtype=torch.float64).reshape(2, 4, 3)
    step = step_of(op, (numbers, *rest))
    relevance = tuple(normal(*part.shape, seed=index) for index, part in enumerate(step.output))
    expected = torch.zeros(24, dtype=torch.float64)
    for part, values in zip(step.output, relevance, strict=True):
        expected[part.flatten().long()] = values.flatten()
    (found,) = RULES["chefer"][op](step, relevance)
    assert torch.equal(found.flatten(), expected)


class Joined(nn.Module):
    """Values cut apart, joined again and read twice, all by getitem, cat and stack."""

    def forward(self, x: Tensor) -> Tensor:
        red, green, blue = x.unbind(1)
        first = torch.cat([blue, red], 1)
        second = torch.stack([green, blue], 1).flatten(1, 2)
        return torch.cat([first, second.roll(1, 1)], 1).flatten(1)


def test_values_read_twice_get_the_sum_of_both():
    graph = captured_module(nn.Sequential(Joined(), nn.Unflatten(1, (16, 4)), _Scaled()), 4)
    numbers = torch.arange(2 * 48, dtype=torch.float32).reshape(2, 3, 4, 4)
    moved = Joined()(numbers)
    relevance = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2 * 48)
    expected.index_add_(0, moved.flatten().long(), relevance.flatten())
    found = propagate(graph, numbers, lambda output: relevance, RULES["chefer"])
    assert torch.allclose(found.pixels.flatten(), expected, atol=1e-6) and not found.without_rule


class _Scaled(nn.Module):
    """A factor, so that the graph has a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


# Whole networks


def predicted(output: Tensor) -> Tensor:
    return start_at(output, None, output.shape[1], "pred")


class Rectifiers(nn.Module):
    """A network that is linear piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.one(x))
        return self.head((x + torch.relu(self.two(x))).mean((2, 3)))


@pytest.mark.parametrize("family", ["epsilon", "attnlrp"])
def test_epsilon_on_rectifiers_is_gradient_times_input(family: str):
    model = randomised(Rectifiers())
    x = images(3, 8).requires_grad_()
    output = model(x)
    output.max(1).values.sum().backward()
    assert x.grad is not None
    found = propagate(captured_module(model), x.detach(), lambda y: predicted(y) * y, RULES[family])
    assert torch.allclose(found.pixels, x.detach() * x.grad, rtol=1e-2, atol=1e-3)
    assert torch.allclose(found.output, output.detach(), atol=1e-5)


@cache
def without_constants() -> Graph:
    """A ViT without class token whose biases and position embedding are zero: nothing is left to absorb relevance."""
    name, _, arguments = FAMILIES["vit"]
    model = randomised(build(name, {**arguments, "class_token": False, "global_pool": "avg"}, 10))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or name == "pos_embed":
                parameter.zero_()
    return capture(model, (3, 32, 32))


@pytest.mark.parametrize("family", ["chefer", "epsilon", "gamma"])
def test_relevance_is_conserved_at_every_block(family: str):
    graph = without_constants()
    cuts = {name: block.name for block in graph.blocks for name in block.inputs if "sym" not in name}
    totals: dict[str, tuple[Tensor, Tensor]] = {}

    def visit(name: str, relevance: Tensor) -> None:
        if name in cuts:
            flat = relevance.double().flatten(1)
            totals[cuts[name]] = flat.sum(1), flat.abs().sum(1)

    propagate(graph, images(4, 32), predicted, RULES[family], visit)
    assert set(totals) == {block.name for block in graph.blocks} and len(totals) >= 4
    for block, (total, size) in totals.items():  # shares of both signs that cancel are as exact as float32 is
        lost = (total - 1).abs()
        assert (lost < (0.01 if family == "chefer" else 0.01 + 1e-4 * size)).all(), (block, total)


@pytest.mark.parametrize("family", ["epsilon", "gamma"])
def test_what_is_not_conserved_is_what_biases_absorb(family: str):
    model = Tokens(nn.Sequential(ThreeProjections(), NormThenLinear(), nn.Linear(8, 6)))
    graph = captured_module(randomised(model), 6)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    x, found = images(2, 6), {}
    result = propagate(graph, x, predicted, RULES[family], lambda name, relevance: found.setdefault(name, relevance))
    values = values_at(graph.module, x, list(found))
    absorbed, size = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name, relevance in found.items():
        node = nodes[name]
        if node.target not in (aten.linear.default, aten.conv2d.default):
            continue
        arguments = [tensor_of(graph.module, part) if part.op == "get_attr" else values[part.name] for part in node.args[:3]]
        shape = (-1, *[1] * (values[name].dim() - 2)) if node.target is aten.conv2d.default else (-1,)
        bias, y = arguments[2].reshape(shape), values[name]
        denominator = y.double()
        if family == "gamma":  # y + gamma times the terms of its sign, both by an op on split signs
            x_up, x_down, w_up, w_down = (part.clamp(**{side: 0}) for part in arguments[:2] for side in ("min", "max"))
            rest = (None, *node.args[3:])
            up = node.target(x_up, w_up, *rest) + node.target(x_down, w_down, *rest)
            down = node.target(x_up, w_down, *rest) + node.target(x_down, w_up, *rest)
            denominator = denominator + GAMMA * torch.where(y >= 0, up, down)
        share = (bias * relevance.double() / denominator).flatten(1)
        absorbed, size = absorbed + share.sum(1), size + share.abs().sum(1)
    total = result.pixels.double().flatten(1).sum(1) + absorbed
    assert (absorbed.abs() > 0.01).any()
    assert torch.allclose(total, torch.ones(2, dtype=torch.float64), atol=0.01 + 1e-4 * float(size.max()))


@pytest.mark.parametrize("family", ["vit", "swin", "cait", "levit"])
def test_an_images_relevance_is_its_own(family: str):
    """Alone or in a batch, whatever axis counts its windows."""
    graph, x = captured(family)[1], images(3, FAMILIES[family][1])
    together = propagate(graph, x, predicted, RULES["chefer"])
    alone = torch.cat([propagate(graph, one[None], predicted, RULES["chefer"]).pixels for one in x])
    assert together.pixels.isfinite().all() and together.pixels.abs().sum() > 0.1
    assert not together.without_rule
    assert torch.allclose(together.pixels, alone, rtol=1e-2, atol=1e-4 * float(alone.abs().max()))


def test_finds_the_axis_that_counts_images():
    assert image_axis((6, 4, 5), (3, 4, 5), 2) == 0
    assert image_axis((4, 6, 5), (4, 3, 5), 2) == 1
    assert image_axis((4, 5), (4, 5), 2) is None
    assert image_axis((4, 5), (4, 5), 1) == 0


# The metric


def subject(graph: Graph, batches, num_classes: int = 10, **options) -> Subject:
    return Subject(graph, {}, batches, (2, 4, 8), num_classes, options=MetricOptions(**options))


@cache
def rewritten(family: str, classes: int = 10) -> Graph:
    return rewrite(captured(family, classes)[1])


def vit() -> Graph:
    return rewritten("vit")


def test_costs_are_importance_times_the_error_of_a_width():
    table = METRICS["lrp"](subject(vit(), [(images(3, 32), None)]))
    layers = {layer.name for layer in vit().layers}
    assert table.unit == "relative" and set(table.importance) == layers and sum(table.importance.values()) == pytest.approx(1)
    for layer in vit().layers:
        expected = pytest.approx([table.importance[layer.name] / 4**width for width in (2, 4, 8)])
        assert table.tied[layer.name] == pytest.approx(expected)
        parts = [table.activation[layer.name], *([table.weight[layer.name]] if layer.has_weight else [])]
        assert [sum(costs) for costs in zip(*parts, strict=True)] == pytest.approx(expected)
        assert (layer.name in table.weight) == layer.has_weight


@pytest.mark.parametrize("rules", RULES)
def test_importance_is_deterministic_and_the_mean_over_images(rules: str):
    x = images(11, 32)
    batches = [(x[:9], None), (x[9:], None)]
    first, again = (lrp(subject(vit(), batches, lrp_rules=rules)) for _ in range(2))
    assert first == again
    alone = [lrp(subject(vit(), [(one[None], None)], lrp_rules=rules)).importance for one in x]
    for layer, share in first.importance.items():
        assert share == pytest.approx(sum(each[layer] for each in alone) / len(x), rel=0.02, abs=1e-4)


def test_importance_is_relevance_summed_as_asked():
    x = images(1, 32)
    found: dict[str, Tensor] = {}
    propagate(vit(), x, predicted, RULES["chefer"], found.__setitem__)
    sums = {
        "abs": lambda values: sum(abs(value) for value in values),
        "positive": lambda values: sum(value for value in values if value > 0),
        "signed": lambda values: abs(sum(values)),
    }
    for aggregate, summed in sums.items():
        scores = {layer.name: summed(found[vit().nodes[layer.name]].double().flatten().tolist()) for layer in vit().layers}
        table = lrp(subject(vit(), [(x, None)], lrp_aggregate=aggregate))
        assert table.importance == pytest.approx({name: score / sum(scores.values()) for name, score in scores.items()}, rel=1e-5)


def test_signed_sums_tie_within_a_branch_and_others_do_not():
    importance = {
        aggregate: lrp(subject(rewrite(without_constants()), [(images(4, 32), None)], lrp_aggregate=aggregate)).importance
        for aggregate in ("signed", "abs")
    }
    for block in ("blocks.0", "blocks.1"):
        signed, plain = (importance[kind] for kind in ("signed", "abs"))
        assert signed[f"{block}.mlp.fc1"] == pytest.approx(signed[f"{block}.mlp.fc2"], rel=1e-3)
        assert signed[f"{block}.attn.av"] == pytest.approx(signed[f"{block}.attn.proj"], rel=1e-3)
        assert plain[f"{block}.mlp.fc1"] != pytest.approx(plain[f"{block}.mlp.fc2"], rel=0.05)


@pytest.mark.parametrize(
    ("last", "branch"), [("mlp.fc2", ("mlp.fc1", "mlp.fc2")), ("attn.proj", ("attn.qkv", "attn.qk", "attn.av", "attn.proj"))]
)
def test_a_branch_that_adds_nothing_has_no_importance(last: str, branch: tuple[str, ...]):
    model = timm_model("vit")
    with torch.no_grad():
        for parameter in model.get_submodule(f"blocks.1.{last}").parameters():
            parameter.zero_()
    graph = capture(model, (3, 32, 32))
    for rules in RULES:
        importance = lrp(subject(graph, [(images(2, 32), None)], lrp_rules=rules)).importance
        assert {name for name, share in importance.items() if share == 0} == {f"blocks.1.{name}" for name in branch}, rules


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(("family", "classes"), [("swin", 10), ("cait", 10), ("levit", 10), ("vit", 0)])
def test_every_family_gets_finite_importance(family: str, classes: int, rules: str):
    table = lrp(subject(rewritten(family, classes), [(images(2, FAMILIES[family][1]), None)], classes, lrp_rules=rules))
    assert all(math.isfinite(share) and share > 0 for share in table.importance.values())
    assert sum(table.importance.values()) == pytest.approx(1)


def test_labels_choose_the_class():
    x = images(4, 32)
    with torch.no_grad():
        labels = vit().module(x).argmax(1)
    asked, others = (lrp(subject(vit(), [(x, given)], lrp_target="label")) for given in (labels, (labels + 1) % 10))
    assert asked == lrp(subject(vit(), [(x, None)])) != others


@pytest.mark.parametrize(
    ("labels", "num_classes", "message"),
    [
        (None, 10, "lrp target 'label' cannot be used with images without labels; use 'pred', or images in one folder a class"),
        (torch.tensor([1, 2]), 0, "lrp target 'label' cannot be used with a model without classes"),
        (torch.tensor([1, 12]), 10, "label 12 is none of the model's 10 classes"),
        (torch.tensor([-1, 2]), 10, "label -1 is none of the model's 10 classes"),
    ],
)
def test_labels_that_cannot_be_used_are_errors(labels: Tensor | None, num_classes: int, message: str):
    with pytest.raises(InputError, match=message):
        lrp(subject(vit(), [(images(2, 32), labels)], num_classes, lrp_target="label"))


def test_a_backbone_starts_at_the_squares_of_its_output():
    z = torch.tensor([[1.0, -2.0, 2.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(start_at(z, None, 0, "pred"), torch.tensor([[1.0, 4.0, 4.0], [0.0, 0.0, 0.0]]) / 9)


def test_no_relevance_at_all_is_an_error():
    model = timm_model("vit")
    with torch.no_grad():
        model.get_submodule("head").get_parameter("weight").zero_()
    graph = capture(model, (3, 32, 32))
    graph = replace(graph, layers=tuple(layer for layer in graph.layers if layer.name != "head"))
    with pytest.raises(InputError, match="the chefer rules with aggregate abs leave no finite relevance at any layer; use"):
        lrp(subject(graph, [(images(2, 32), None)]))


class Tangent(nn.Module):
    """A network with an op that no family names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.atan(self.fc1(x)))


def test_an_op_without_a_rule_takes_the_epsilon_rule_and_is_named(caplog: pytest.LogCaptureFixture):
    graph = captured_module(randomised(Tokens(Tangent())))
    found: dict[str, Tensor] = {}
    x = images(2, 8)
    result = propagate(graph, x, predicted, RULES["chefer"], found.__setitem__)
    assert result.without_rule == {"aten.atan.default"}
    node = next(node for node in graph.module.graph.nodes if node.target is aten.atan.default)
    inner, outer = (values_at(graph.module, x, [name])[name] for name in (node.args[0].name, node.name))
    assert torch.allclose(found[node.args[0].name], found[node.name] * inner / (1 + inner**2) / outer, rtol=1e-3, atol=1e-6)
    with caplog.at_level(logging.WARNING, "vitq"):
        lrp(subject(graph, [(x, None), (x, None)], 8))
    assert [record.getMessage() for record in caplog.records if record.name == "vitq"] == [
        "lrp: these ops have no rule of their own and take the epsilon rule: aten.atan.default"
    ]
