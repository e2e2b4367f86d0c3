"""The default metric against its definition: exact Fisher matrices, naively rerun layers, and the exact sum over classes."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from small_models import NormThenLinear, ThreeProjections, Tokens, captured, captured_module, images, randomised
from torch import Tensor, nn

from vitq.affine import quantize_weight
from vitq.artifacts import CostTable, Operand
from vitq.fitting import fit_operand
from vitq.gradients import error_pair, error_probe, fisher_pair, fisher_probe, pair_for, probe_for, trace
from vitq.graph import Graph, analyse, copy, run, tensor_of
from vitq.importance import MetricOptions, Subject
from vitq.quantizers import Quantizer
from vitq.ranges import Batches, Histogram, fold, histograms, weight_ranges
from vitq.rewrites import rewrite

BITS = (2, 4, 8)
METRIC = sys.modules["vitq.importance.output_fisher"]  # the package shows the function of that name
NEGLIGIBLE = METRIC._NEGLIGIBLE


@pytest.fixture(autouse=True)
def _nothing_negligible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are compared exactly; what leaving out small products changes has a test of its own."""
    monkeypatch.setattr(METRIC, "_NEGLIGIBLE", 0.0)


class SignsOf:
    """A generator's stand-in whose signs are given, so that all patterns can be gone through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.signs = torch.ones(1)
        monkeypatch.setattr("vitq.gradients._signs", lambda like, generator: self.signs.expand_as(like).to(like))


def gradients_under_all_signs(probe, output: Tensor, signs: SignsOf) -> Tensor:
    """The probe's gradient at the output for each sign pattern: (patterns, B, K)."""
    found = []
    for pattern in itertools.product([-1.0, 1.0], repeat=output.shape[1]):
        signs.signs = torch.tensor(pattern)
        z = output.clone().requires_grad_()
        found.append(torch.autograd.grad(probe(z, torch.Generator()).sum(), z)[0])
    return torch.stack(found)


@pytest.mark.parametrize(("classes", "likeliest"), [(2, 32), (3, 32), (6, 32), (6, 3), (6, 1)])
def test_the_probe_of_a_classifier_has_the_fisher_information(classes: int, likeliest: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vitq.gradients._LIKELIEST", likeliest)
    logits = 3 * torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    v = gradients_under_all_signs(fisher_probe, logits, SignsOf(monkeypatch))
    p = logits.softmax(1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert torch.allclose(torch.einsum("sbi,sbj->bij", v, v) / len(v), fisher, atol=1e-6)


def test_where_two_classes_compete_no_sign_changes_what_a_change_costs(monkeypatch: pytest.MonkeyPatch):
    logits = torch.tensor([[5.0, 4.6, -9.0, -8.0], [-7.0, 2.0, -9.0, 2.0], [9.0, -1.0, -12.0, -13.0]])
    v = gradients_under_all_signs(fisher_probe, logits, SignsOf(monkeypatch))
    change = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    costs = (v * change).sum(2).square()
    assert bool((costs.std(0) < 0.05 * costs.mean(0)).all())
    monkeypatch.setattr("vitq.gradients._LIKELIEST", 1)  # signs of the classes as they are
    v = gradients_under_all_signs(fisher_probe, logits, SignsOf(monkeypatch))
    costs = (v * change).sum(2).square()
    assert bool((costs.std(0)[:2] > 0.8 * costs.mean(0)[:2]).all())


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_each_probe_of_a_pair_has_the_fisher_information(classes: int, monkeypatch: pytest.MonkeyPatch):
    logits = 3 * torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)
    for row in (0, 1):
        v = gradients_under_all_signs(lambda z, generator, row=row: fisher_pair(z, generator)[row], logits, SignsOf(monkeypatch))
        expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        assert torch.allclose(torch.einsum("sbi,sbj->bij", v, v) / len(v), expected, atol=1e-5)


def test_a_pair_of_probes_is_exact_where_three_classes_compete(monkeypatch: pytest.MonkeyPatch):
    """The Fisher information of three classes has two axes, whose product cancels in the pair's mean, whatever the signs."""
    logits = torch.tensor([[1.0, 0.5, -0.3], [2.0, -1.0, 1.5]])
    change = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    rows = [
        gradients_under_all_signs(lambda z, generator, row=row: fisher_pair(z, generator)[row], logits, SignsOf(monkeypatch))
        for row in (0, 1)
    ]
    p = logits.softmax(1)
    exact = (p * change.square()).sum(1) - (p * change).sum(1).square()
    single, other = ((v * change).sum(2).square() for v in rows)
    assert torch.allclose((single + other) / 2, exact.expand_as(single), rtol=1e-4)
    assert bool((single.std(0) > 0.1 * exact).all())


def test_the_fisher_information_is_the_hessian_of_the_kl_divergence():
    logits = torch.randn(5, generator=torch.Generator().manual_seed(1)).double()
    p = logits.softmax(0)

    def kl(z: Tensor) -> Tensor:
        return (p * (logits.log_softmax(0) - z.log_softmax(0))).sum()

    assert torch.allclose(torch.func.hessian(kl)(logits), torch.diag(p) - torch.outer(p, p), atol=1e-8)


def test_the_probe_of_a_backbone_has_the_hessian_of_the_relative_error(monkeypatch: pytest.MonkeyPatch):
    features = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    v = gradients_under_all_signs(error_probe, features, SignsOf(monkeypatch))
    expected = torch.eye(5) / features.square().sum(1)[:, None, None]
    assert torch.allclose(torch.einsum("sbi,sbj->bij", v, v) / len(v), expected, atol=1e-6)


def test_probes_follow_their_generator():
    z = torch.randn(8, 10, generator=torch.Generator().manual_seed(0))
    first, again, other = (fisher_probe(z, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert probe_for(10) is fisher_probe and probe_for(0) is error_probe
    assert pair_for(10) is fisher_pair and pair_for(0) is error_pair


# The trace and the closed forms, against rerunning each layer


class Mixed(nn.Module):
    """Every kind of layer: strided, grouped and depthwise convolutions, attention, linears on windows, a gate of rank 2."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, padding="same", groups=8)
        self.along = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = ThreeProjections()
        self.branch = NormThenLinear()
        self.gate = nn.Linear(8, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.act(self.grouped(x)) + self.depthwise(x)
        x = x.flatten(2)
        x = (x + self.along(x)).transpose(1, 2)  # (B, 16, 8)
        windows = x.unflatten(1, (4, 4)).flatten(0, 1)
        x = self.attention(windows).unflatten(0, (-1, 4)).flatten(1, 2)
        x = self.branch(x).mean(1)
        return self.head(x * torch.sigmoid(self.gate(x)))


def fixed_probe(output: Tensor, generator: torch.Generator) -> Tensor:
    """A probe without chance: every image has the same signs."""
    log_p = output.log_softmax(-1)
    signs = torch.tensor([1.0, -1.0]).repeat(output.shape[-1])[: output.shape[-1]]
    return (log_p.detach().exp().sqrt() * signs * log_p).sum(1)


@dataclass(frozen=True)
class Case:
    graph: Graph
    histograms: dict[str, Histogram]
    batch: Tensor
    fitted: dict[tuple[str, int], Quantizer] = field(default_factory=dict)

    def quantizer(self, operand: Operand, bits: int) -> Quantizer:
        if (operand.tensor, bits) not in self.fitted:
            self.fitted[operand.tensor, bits] = fit_operand(self.histograms[operand.tensor], bits, operand.role)
        return self.fitted[operand.tensor, bits]


@pytest.fixture(scope="module")
def mixed() -> Case:
    graph = rewrite(captured_module(randomised(Mixed())))
    x = images(6, 8, seed=2)
    folded, found = fold(graph, [(x, None)])
    return Case(folded, found, x)


def quantized_operands(case: Case, layer, weight_bits: int | None, activation_bits: int | None, arguments):
    """The layer's arguments with its operands quantized; None leaves a kind as it is."""
    changed = list(arguments)
    for index, operand in enumerate(layer.activations):
        if activation_bits is not None:
            changed[index] = case.quantizer(operand, activation_bits).quantize_dequantize(arguments[index])
    if layer.has_weight and weight_bits is not None:
        changed[1] = quantize_weight(arguments[1], *weight_ranges(arguments[1], weight_bits), weight_bits).dequantize()
    return changed


@dataclass(frozen=True)
class Seen:
    """What a layer got, image by image, and the gradient that the probe has with respect to a zero added to its output."""

    compute: Callable[..., Tensor] | None
    arguments: list[tuple]
    gradients: list[Tensor]


@pytest.fixture(scope="module")
def seen(mixed: Case) -> dict[str, Seen]:
    """One run and one backward pass an image, so that no gradient can have come from another one."""
    found = {layer.name: Seen(None, [], []) for layer in mixed.graph.layers}
    for image in mixed.batch.split(1):
        zeros: dict[str, Tensor] = {}

        def watch(name: str, zeros=zeros):
            def intercept(compute, *arguments):
                output = compute(*arguments)
                zeros[name] = torch.zeros_like(output, requires_grad=True)
                detached = tuple(argument.detach() if isinstance(argument, Tensor) else argument for argument in arguments)
                found[name] = Seen(compute, [*found[name].arguments, detached], found[name].gradients)
                return output + zeros[name]

            return intercept

        output = run(mixed.graph.module, image, {node: watch(name) for name, node in mixed.graph.nodes.items()})
        gradients = torch.autograd.grad(fixed_probe(output, torch.Generator()).sum(), list(zeros.values()))
        for name, gradient in zip(zeros, gradients, strict=True):
            found[name].gradients.append(gradient)
    return found


def error_of(case: Case, layer, compute, arguments, weight_bits: int | None, activation_bits: int | None) -> Tensor:
    """The change of a layer's output when its operands are quantized and calibration has put mean and spread right."""

    def output(*bits: int | None) -> Tensor:
        found = compute(*quantized_operands(case, layer, *bits, arguments))
        if layer.has_weight:
            channel = found.dim() - 1 if layer.op == "linear" else 1
            found = found - found.mean([axis for axis in range(found.dim()) if axis != channel], keepdim=True)
        return found

    wanted, gain = output(None, None), torch.ones(())
    if layer.op == "linear":
        for bits in ((weight_bits, None), (None, activation_bits)):
            gain = gain * wanted.norm() / output(*bits).norm().clamp(min=1e-6)
    return gain.clamp(0.5, 2) * output(weight_bits, activation_bits) - wanted


def naive_u(case: Case, layer, seen: Seen, weight_bits: int | None, activation_bits: int | None) -> Tensor:
    """u of one layer (images,): the layer is run again with quantized operands, and its error meets the gradients."""
    together = [
        torch.cat(part) if isinstance(part[0], Tensor) and index < len(layer.activations) else part[0]
        for index, part in enumerate(zip(*seen.arguments, strict=True))
    ]
    error = error_of(case, layer, seen.compute, together, weight_bits, activation_bits)
    return (error * torch.cat(seen.gradients)).reshape(len(case.batch), -1).sum(1)


def price(
    graph: Graph, found: dict[str, Histogram], batches: Batches, bits: tuple[int, ...], probe=fisher_probe, pairs: bool = False
) -> CostTable:
    """The metric's costs under a probe of the test's choice."""

    class Probed(Subject):
        @property
        def pair(self):
            return probe

    return METRIC.output_fisher(Probed(graph, found, batches, bits, num_classes=0, options=MetricOptions(pairs=pairs)))


def traced_u(case: Case) -> dict[str, Tensor]:
    """u of every layer at every pair of widths, as the metric computes it: (images, 1 + widths, 1 + widths)."""
    found = {}
    pricing = METRIC._Pricing.of(Subject(case.graph, case.histograms, (), BITS, num_classes=0))

    def visit(traced) -> None:
        products = pricing.products(traced, len(case.batch))
        moments = METRIC._Moments.zeros(len(BITS))
        moments.add(products)
        gain = torch.from_numpy(moments.gain()).float()
        found[traced.layer.name] = gain * products.errors + (gain - 1) * products.output[:, None, None]

    trace(case.graph, case.batch, fixed_probe, torch.Generator(), visit)
    return found


def visited(case: Case) -> list[str]:
    names = []
    trace(case.graph, case.batch, fixed_probe, torch.Generator(), lambda traced: names.append(traced.layer.name))
    return names


def test_several_probes_are_traced_one_after_the_other(mixed: Case):
    def two(output: Tensor, generator: torch.Generator) -> Tensor:
        return torch.stack([fixed_probe(output, generator), 3 * output.flatten(1)[:, 0]])

    seen: list[list[tuple[str, Tensor, Tensor]]] = [[]]
    rest = lambda traced: seen[-1].append((traced.layer.name, traced.gradient.clone(), traced.input_gradients[0].clone()))  # noqa: E731
    trace(mixed.graph, mixed.batch, two, torch.Generator(), rest, lambda: seen.append([]))
    assert seen.pop() == [] and len(seen) == 2
    for row, found in enumerate(seen):
        alone: list[tuple[str, Tensor, Tensor]] = []
        trace(
            mixed.graph,
            mixed.batch,
            lambda output, generator, row=row: two(output, generator)[row],
            torch.Generator(),
            lambda traced, alone=alone: alone.append((traced.layer.name, traced.gradient.clone(), traced.input_gradients[0].clone())),
        )
        assert [name for name, _, _ in found] == [name for name, _, _ in alone] == visited(mixed)
        for (_, g, dx), (_, expected_g, expected_dx) in zip(found, alone, strict=True):
            assert torch.allclose(g, expected_g, atol=1e-6) and torch.allclose(dx, expected_dx, atol=1e-6)


def test_a_pair_costs_the_mean_of_its_probes(mixed: Case):
    pair, *single = (
        price(mixed.graph, mixed.histograms, [(mixed.batch, None)], (2, 4), probe)
        for probe in (fisher_pair, fisher_probe, lambda output, generator: fisher_pair(output, generator)[1])
    )
    for layer, costs in pair.tied.items():
        assert sum(costs) == pytest.approx(sum(sum(found.tied[layer]) for found in single) / 2, rel=1e-3), layer


def test_every_layer_is_traced_and_a_reader_before_what_it_reads(mixed: Case):
    names = visited(mixed)
    assert sorted(names) == sorted(layer.name for layer in mixed.graph.layers)
    assert names[0] == "head" and names.index("branch.fc2") < names.index("branch.fc1") < names.index("stem") == len(names) - 1


def test_u_of_every_kind_of_layer_is_that_of_the_layer_run_again(mixed: Case, seen: dict[str, Seen]):
    found = traced_u(mixed)
    ops = {layer.op for layer in mixed.graph.layers}
    assert ops == {"linear", "convolution", "matmul"} and len(found) == len(mixed.graph.layers) == 14
    for layer in mixed.graph.layers:
        u = found[layer.name]
        pairs = itertools.product(range(len(BITS) + 1), repeat=2) if layer.has_weight else [(i, i) for i in range(1, len(BITS) + 1)]
        for row, column in pairs:
            if row == column == 0 or (layer.op == "convolution" and row != column and 0 not in (row, column)):
                continue  # of a convolution, the product of both errors is computed for equal widths and taken for the others
            widths = [None, *BITS]
            expected = naive_u(mixed, layer, seen[layer.name], widths[row], widths[column])
            size = float(expected.abs().max())
            assert torch.allclose(u[:, row, column], expected, rtol=1e-3, atol=1e-3 * size + 1e-7), (layer.name, row, column)


def test_pairs_apart_of_a_convolution_are_near(mixed: Case, seen: dict[str, Seen]):
    found = traced_u(mixed)
    for layer in mixed.graph.layers:
        if layer.op == "convolution":
            expected = naive_u(mixed, layer, seen[layer.name], 4, 8)
            assert float((found[layer.name][:, 2, 3] - expected).norm()) < 0.1 * float(expected.norm())


def test_costs_are_half_the_mean_square_of_u(mixed: Case):
    table = price(mixed.graph, mixed.histograms, [(mixed.batch, None)], BITS, fixed_probe)
    u = {name: 0.5 * value.double().square().mean(0).numpy() for name, value in traced_u(mixed).items()}
    for layer in mixed.graph.layers:
        expected = u[layer.name]
        if np.all(np.diff(np.diagonal(expected)[1:]) <= 0):  # else the costs are made monotone
            assert np.allclose(table.tied[layer.name], np.diagonal(expected)[1:], rtol=1e-4)
        if not layer.has_weight:
            assert table.activation[layer.name] == table.tied[layer.name]
        elif np.all(np.diff(expected[1:, 0]) <= 0) and np.all(np.diff(expected[0, 1:]) <= 0):
            both = np.add.outer(table.weight[layer.name], table.activation[layer.name]) + table.cross[layer.name]
            assert np.allclose(both, expected[1:, 1:], rtol=1e-4, atol=1e-12)
            assert np.allclose(table.weight[layer.name], expected[1:, 0], rtol=1e-4)


def test_pairs_are_the_mean_products_of_both_layers_u(mixed: Case):
    """At tied widths, for layers of one block or of adjacent ones."""
    u = traced_u(mixed)
    table = price(mixed.graph, mixed.histograms, [(mixed.batch, None)], BITS, fixed_probe, pairs=True)
    position = {block.name: index for index, block in enumerate(mixed.graph.blocks)}
    block = {layer.name: position[layer.block] for layer in mixed.graph.layers}
    names = [layer.name for layer in mixed.graph.layers]
    expected = {(a, b) for a, b in itertools.combinations(names, 2) if abs(block[a] - block[b]) <= 1}
    assert {(pair.first, pair.second) for pair in table.pairs} == expected and len(expected) > 5
    for pair in table.pairs:
        for (row, column), cost in np.ndenumerate(np.array(pair.costs)):
            first, second = u[pair.first][:, row + 1, row + 1].double(), u[pair.second][:, column + 1, column + 1].double()
            size = float(first.square().mean().sqrt() * second.square().mean().sqrt())
            assert cost == pytest.approx(float((first * second).mean()), rel=1e-3, abs=1e-4 * size)
    assert not price(mixed.graph, mixed.histograms, [(mixed.batch, None)], BITS, fixed_probe).pairs


def test_costs_do_not_depend_on_the_order_of_layers(mixed: Case):
    batches = [(mixed.batch, None)]
    swapped = Graph(mixed.graph.module, mixed.graph.input_shape, mixed.graph.layers[::-1], mixed.graph.nodes, mixed.graph.blocks)
    a, b = (price(graph, mixed.histograms, batches, BITS, fixed_probe) for graph in (mixed.graph, swapped))
    for layer in mixed.graph.layers:
        assert np.allclose(a.tied[layer.name], b.tied[layer.name], rtol=1e-5)


def exact_costs(case: Case, bits: int) -> dict[str, float]:
    """1/2 mean_n sum_k p_k (derivative of log p_k along d)^2, with d the error of a layer at a tied width, mean and spread restored."""
    costs = {}
    p = run(case.graph.module, case.batch).softmax(1)
    for layer in case.graph.layers:

        def log_p(amount: Tensor, layer=layer) -> Tensor:
            def shifted(compute, *arguments):
                return compute(*arguments) + amount * error_of(case, layer, compute, arguments, bits, bits)

            return run(case.graph.module, case.batch, {case.graph.nodes[layer.name]: shifted}).log_softmax(1)

        _, slope = torch.func.jvp(log_p, (torch.zeros(()),), (torch.ones(()),))
        costs[layer.name] = float(0.5 * (p * slope.square()).sum(1).mean())
    return costs


def test_costs_are_half_the_exact_sum_over_classes(mixed: Case, monkeypatch: pytest.MonkeyPatch):
    signs = SignsOf(monkeypatch)

    def every_pattern():
        for pattern in itertools.product([-1.0, 1.0], repeat=4):
            signs.signs = torch.tensor(pattern)
            yield mixed.batch, None

    table = price(mixed.graph, mixed.histograms, every_pattern(), (2, 4), fisher_probe)
    for index, bits in enumerate((2, 4)):
        for name, expected in exact_costs(mixed, bits).items():
            assert table.tied[name][index] == pytest.approx(expected, rel=1e-3), name


def test_random_signs_come_near_the_exact_costs():
    graph = rewrite(captured("vit")[1])
    x = images(16, 32, seed=4)
    folded, found = fold(graph, [(x, None)])
    expected = exact_costs(Case(folded, found, x), 4)
    table = price(folded, found, [(x, None)] * 8, (4,), fisher_probe)
    logarithms = np.log([[table.tied[name][0], cost] for name, cost in expected.items()])
    assert abs(np.diff(logarithms).mean()) < 0.3
    assert np.corrcoef(logarithms.T)[0, 1] > 0.97


def check_table(table: CostTable, graph: Graph, bits: tuple[int, ...]) -> None:
    assert table.unit == "nats" and table.bits == bits
    assert set(table.tied) == set(table.activation) == {layer.name for layer in graph.layers}
    assert set(table.weight) == set(table.cross) == {layer.name for layer in graph.layers if layer.has_weight}
    for name, costs in (*table.tied.items(), *table.weight.items(), *table.activation.items()):
        assert all(cost >= 0 and np.isfinite(cost) for cost in costs)
        assert list(costs) == sorted(costs, reverse=True)
        # The first query of cait's class attention reads the class token alone, no image: the bias takes its whole error up.
        assert (costs[0] > 1e-12) == (name != "blocks_token_only.0.attn.q")


@pytest.mark.parametrize("family", ["swin", "cait", "levit"])
def test_real_models_have_complete_falling_costs(family: str):
    graph = rewrite(captured(family)[1])
    batches = [(images(4, graph.input_shape[1:]), None)]
    folded, found = fold(graph, batches)
    check_table(price(folded, found, batches, (3, 8), fisher_probe), folded, (3, 8))


def test_a_backbone_is_priced_by_its_relative_error():
    graph = rewrite(captured("vit", num_classes=0)[1])
    x = images(4, 32)
    folded, found = fold(graph, [(x, None)])
    table = price(folded, found, [(x, None)] * 12, (3,), error_probe)
    check_table(table, folded, (3,))
    name = "blocks.1.mlp.fc2"
    layer = next(layer for layer in folded.layers if layer.name == name)
    with torch.no_grad():
        z = run(folded.module, x)

        def quantized(compute, *arguments):
            output = compute(*arguments)
            error = compute(*quantized_operands(Case(folded, found, x), layer, 3, 3, arguments)) - output
            return output + 0.1 * (error - error.mean((0, 1)))  # a tenth of the error: the loss is of second order

        changed = run(folded.module, x, {folded.nodes[name]: quantized})
    relative = (changed - z).flatten(1).square().sum(1) / z.flatten(1).square().sum(1)
    assert table.tied[name][0] == pytest.approx(100 * 0.5 * float(relative.mean()), rel=0.4)


def test_an_operand_without_error_costs_nothing():
    """A weight whose values are codes already: only the activation is priced."""
    graph = rewrite(captured_module(randomised(Tokens(NormThenLinear()))))
    x = images(4, 8)
    module = copy(graph)
    layer = next(layer for layer in graph.layers if layer.name == "body.fc2")
    weight = tensor_of(module, graph.layer_node(layer.name).args[1])
    with torch.no_grad():
        weight.copy_(quantize_weight(weight, torch.full((8,), 0.1), torch.full((8,), 1.0), 2).dequantize())
        weight[:, :4] = torch.tensor([-0.1, 0.0, 0.1, 0.2])
    exact = analyse(module, graph.input_shape)
    table = price(exact, histograms(exact, [(x, None)]), [(x, None)], (2,), fixed_probe)
    assert table.weight["body.fc2"][0] < 1e-9 * table.activation["body.fc2"][0]


def test_tracing_leaves_the_graph_as_it_was(mixed: Case):
    before = {name: tensor.clone() for name, tensor in mixed.graph.module.state_dict().items()}
    visited(mixed)
    assert all(torch.equal(before[name], tensor) for name, tensor in mixed.graph.module.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in mixed.graph.module.parameters())


def test_negligible_products_change_costs_little(monkeypatch: pytest.MonkeyPatch):
    graph = rewrite(captured("vit")[1])
    batches = [(images(8, 32, seed=5), None)]
    folded, found = fold(graph, batches)
    exact = price(folded, found, batches, (2, 3, 4, 6, 8), fisher_probe)
    monkeypatch.setattr(METRIC, "_NEGLIGIBLE", NEGLIGIBLE)
    quick = price(folded, found, batches, (2, 3, 4, 6, 8), fisher_probe)
    ratios = [b / a for name in exact.tied for a, b in zip(exact.tied[name], quick.tied[name], strict=True)]
    assert 0 < np.sqrt(np.mean(np.square(np.log(ratios)))) < 0.1 and min(ratios) > 0.5 and max(ratios) < 2
    unchanged = [sum(exact.tied[name][index] == quick.tied[name][index] for name in exact.tied) for index in (0, -1)]
    assert unchanged[0] > 0.75 * len(exact.tied) and unchanged[1] == 0  # but for softmaxes nothing is left out at 2 bits, everything at 8


def test_halves_are_what_either_half_of_the_images_costs(mixed: Case):
    """Every other image alone, gains from all; their means are the whole. Sums over the widths, which isotonic regression leaves alone."""
    whole = price(mixed.graph, mixed.histograms, [(mixed.batch, None)], (2, 4), fisher_probe)
    first, second = whole.halves
    for layer, costs in whole.tied.items():
        assert sum(costs) == pytest.approx((sum(first.tied[layer]) + sum(second.tied[layer])) / 2, rel=1e-3), layer
    assert first.tied != second.tied and not first.halves
