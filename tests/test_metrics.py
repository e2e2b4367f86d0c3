"""What every metric promises, whichever it is, and each formula against a naive version."""

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from small_models import NormThenLinear, ThreeProjections, Tokens, captured, captured_module, images, randomised
from test_output_fisher import Mixed
from torch import Tensor, nn

from vitq.affine import quantize_weight
from vitq.allocation import allocate
from vitq.artifacts import CostTable, Layer, ModelSpec, Profile
from vitq.errors import InputError, UsageError, VitqError
from vitq.fitting import fit_operand
from vitq.gradients import fisher_probe, trace
from vitq.graph import Graph, run, tensor_of
from vitq.graph.dataflow import argument
from vitq.graph.layers import operand_nodes
from vitq.importance import METRICS, MetricOptions, Subject
from vitq.importance.costs import falling
from vitq.importance.fisher import operand_traces, squared_gradients
from vitq.importance.lampq import fisher_traces, probed_layers, type_scales
from vitq.importance.mix_qvit import combine
from vitq.importance.nuclear import module_norms, module_of
from vitq.ranges import fold, weight_ranges
from vitq.rewrites import rewrite

BITS = (2, 4, 8)
CLASSES = 4


class Net(nn.Module):
    """Two blocks of attention and MLP on 16 tokens of 8 channels, and a head."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.body = Tokens(nn.Sequential(ThreeProjections(), NormThenLinear(), ThreeProjections(), NormThenLinear()))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@cache
def subject_of(kind: Callable[[], nn.Module] = Net, classes: int = CLASSES) -> Subject:
    graph = rewrite(captured_module(randomised(kind())))
    batches = [(images(4, 8, seed=s), (torch.arange(4) + s) % CLASSES) for s in (0, 1)]
    return Subject(*fold(graph, batches), batches, BITS, classes)


@cache
def table_of(metric: str) -> CostTable:
    return METRICS[metric](subject_of())


@pytest.mark.parametrize(("metric", "visits"), [("output-fisher", 2), ("hawq-v2", 1)])
def test_progress_moves_layer_by_layer_within_a_batch(metric: str, visits: int):
    """Two batches of four images: a report a layer and backward pass, evenly over the images."""
    told: list[float] = []
    subject = replace(subject_of(), progress=told.append)
    METRICS[metric](subject)
    assert told == pytest.approx(np.linspace(0, 8, 2 * visits * len(subject.graph.layers), endpoint=False))


def test_progress_of_lrp_moves_by_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules["vitq.importance.lrp"], "_IMAGES_AT_ONCE", 2)  # the function has the name of its module
    told: list[float] = []
    METRICS["lrp"](replace(subject_of(), progress=told.append))
    assert told == [0, 2, 4, 6]


def weight_of(subject: Subject, layer: Layer) -> Tensor:
    return tensor_of(subject.graph.module, operand_nodes(subject.graph.layer_node(layer.name))[1])


# Every metric


@pytest.mark.parametrize("metric", METRICS)
def test_every_layer_has_costs_that_fall(metric: str):
    subject, table = subject_of(), table_of(metric)
    Profile(model=SPEC, layers=subject.graph.layers, costs={metric: table}, rest_bytes=0)  # covers the layers
    assert table.bits == BITS
    for name, costs in (*table.tied.items(), *table.weight.items(), *table.activation.items()):
        assert np.isfinite(costs).all() and min(costs) >= 0, name
        assert list(costs) == sorted(costs, reverse=True), name
    assert sum(costs[0] for costs in table.tied.values()) > 0


SPEC = ModelSpec(architecture="test", num_classes=CLASSES, data_config={}, graph_digest="")


@pytest.mark.parametrize("metric", METRICS)
def test_the_same_seed_gives_the_same_table(metric: str):
    assert METRICS[metric](subject_of()) == table_of(metric)


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_of_layers_does_not_matter(metric: str):
    subject = subject_of()
    graph = subject.graph
    turned = Graph(graph.module, graph.input_shape, graph.layers[::-1], graph.nodes, graph.blocks)
    table, expected = METRICS[metric](replace(subject, graph=turned)), table_of(metric)
    for kind in ("tied", "weight", "activation"):
        for name, costs in getattr(expected, kind).items():
            assert np.allclose(getattr(table, kind)[name], costs, rtol=1e-5, atol=1e-12), (kind, name)


@pytest.mark.parametrize("metric", METRICS)
def test_a_backbone_is_priced_or_refused_with_advice(metric: str):
    backbone = subject_of(lambda: Tokens(NormThenLinear()), 0)
    try:
        table = METRICS[metric](backbone)
    except VitqError as error:
        assert "num_classes" in str(error) and "give" in str(error)
    else:
        assert set(table.tied) == {layer.name for layer in backbone.graph.layers}
        assert all(np.isfinite(costs).all() for costs in table.tied.values())


@pytest.mark.parametrize("metric", METRICS)
def test_every_kind_of_layer_is_priced(metric: str):
    subject = subject_of(Mixed)
    table = METRICS[metric](subject)
    assert set(table.tied) == {layer.name for layer in subject.graph.layers}
    assert set(table.weight) == {layer.name for layer in subject.graph.layers if layer.has_weight}


def test_costs_are_made_to_fall():
    assert falling([3, 1, 2, 0]) == (3, 1.5, 1.5, 0)
    assert falling([1, -2, 1]) == (1, 0, 0)


# Fisher traces: LampQ and HAWQ-V2


def naive_squared_gradients(subject: Subject, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Squared norms of d log p(label) by each layer's weight, or a matmul's two operands: one image, one autograd call at a time."""
    graph, found = subject.graph, {layer.name: [] for layer in subject.graph.layers}
    for image, label in zip(images, labels, strict=True):
        leaves: dict[str, list[Tensor]] = {}

        def watch(layer: Layer, leaves=leaves):
            def intercept(compute, *arguments):
                if layer.has_weight:
                    leaves[layer.name] = [arguments[1].clone().requires_grad_()]
                    return compute(arguments[0], leaves[layer.name][0], *arguments[2:])
                leaves[layer.name] = [torch.zeros_like(x, requires_grad=True) for x in arguments]
                return compute(*(x + zero for x, zero in zip(arguments, leaves[layer.name], strict=True)))

            return intercept

        output = run(graph.module, image[None], {graph.nodes[layer.name]: watch(layer) for layer in graph.layers})
        flat = [leaf for some in leaves.values() for leaf in some]
        gradients = iter(torch.autograd.grad(output.log_softmax(1)[0, label], flat))
        for name, some in leaves.items():
            found[name].append(sum(float(next(gradients).square().sum()) for _ in some))
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.mark.parametrize("kind", [Net, Mixed])
def test_traces_are_per_image_gradients_by_autograd(kind: type[nn.Module]):
    subject = replace(subject_of(kind), options=MetricOptions(fisher="empirical"))
    found = fisher_traces(subject)
    naive = [naive_squared_gradients(subject, batch, labels) for batch, labels in subject.batches if labels is not None]
    for layer in subject.graph.layers:
        expected = float(torch.cat([part[layer.name] for part in naive]).mean())
        assert found[layer.name] == pytest.approx(expected, rel=1e-4), layer.name


@pytest.mark.parametrize("tokens", [2, 40])
def test_both_products_give_one_norm(tokens: int):
    """Few tokens take the Gram matrices, many the gradient itself."""
    graph = rewrite(captured_module(randomised(Tokens(NormThenLinear())), (2, 2 * tokens)))
    x = images(3, (2, 2 * tokens))
    found = {}

    def visit(traced):
        if traced.layer.op == "linear":
            g, value = (t.reshape(3, -1, t.shape[-1]) for t in (traced.gradient, traced.inputs[0]))
            found[traced.layer.name] = squared_gradients(traced, 3)[1], torch.einsum("nto,ntc->noc", g, value).square().sum((1, 2))

    trace(graph, x, fisher_probe, torch.Generator(), visit)
    assert len(found) == 3
    for one, other in found.values():
        assert torch.allclose(one, other, rtol=1e-4)


def test_labels_are_sampled_from_the_model():
    """The probe is log p(y) with y ~ p, drawn by the generator alone."""
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.5, 1.0]]).repeat_interleave(4000, 0)
    sampled = sys.modules["vitq.importance.lampq"]._sampled_label
    first, again = (sampled(logits, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    for half in range(2):
        log_p = logits[4000 * half].log_softmax(0)
        drawn = (first.view(2, 4000)[half, :, None] - log_p).abs() < 1e-6
        assert bool(drawn.any(1).all())
        assert torch.allclose(drawn.double().mean(0), log_p.exp().double(), atol=0.03)


def test_options_of_the_fisher_that_cannot_be_used():
    empirical = replace(subject_of(), options=MetricOptions(fisher="empirical"))
    unlabelled = replace(empirical, batches=[(batch, None) for batch, _ in empirical.batches])
    with pytest.raises(InputError, match=r"the empirical Fisher needs labels and the images have none; give a folder of class folders, or"):
        METRICS["lampq"](unlabelled)
    with pytest.raises(UsageError, match=r"the empirical Fisher needs a classifier .* give fisher true"):
        METRICS["lampq"](replace(empirical, num_classes=0))
    foreign = replace(empirical, batches=[(batch, torch.full((4,), 4)) for batch, _ in empirical.batches])
    with pytest.raises(InputError, match=r"labels 4 to 4, the model 4 classes; give the model's own images, or fisher true"):
        METRICS["lampq"](foreign)


def test_the_scale_of_a_type_cancels_that_of_its_traces(monkeypatch: pytest.MonkeyPatch):
    expected = table_of("lampq")
    kinds = {layer.name: layer.type for layer in subject_of().graph.layers}

    def scaled(subject: Subject) -> dict[str, float]:
        return {name: value * {"fc1": 10.0, "qk": 1e-3}.get(kinds[name], 1.0) for name, value in fisher_traces(subject).items()}

    monkeypatch.setitem(METRICS["lampq"].__globals__, "fisher_traces", scaled)
    found = METRICS["lampq"](subject_of())
    assert all(np.allclose(found.tied[name], costs, rtol=1e-6) for name, costs in expected.tied.items())
    assert all(costs[0] == pytest.approx(16 * costs[1]) for costs in found.tied.values())  # gamma = 4, from 2 bits to 4


def test_scales_are_loss_over_trace():
    layers = subject_of().graph.layers
    probed = probed_layers(layers)
    fc1 = [layer.name for layer in probed if layer.type == "fc1"]
    assert len(fc1) == 2 and len(probed) == len({layer.name for layer in probed})
    traces = {layer.name: 2.0 for layer in layers} | {fc1[0]: 6.0}
    losses = {layer.name: 0.5 for layer in probed} | {fc1[1]: 1.5}
    scales = type_scales(layers, traces, losses)
    assert scales["fc1"] == pytest.approx(1.0 / 4.0) and scales["fc2"] == pytest.approx(0.25)
    assert type_scales(layers, traces, dict.fromkeys(losses, -1.0))["qk"] == pytest.approx(1e-4 / 2)  # a loss is never below its floor


def test_probed_layers_are_spread_in_depth():
    layers = subject_of().graph.layers
    (one,) = (layer for layer in layers if layer.type == "head")
    many = [one.model_copy(update={"name": str(depth)}) for depth in range(12)]
    assert [layer.name for layer in probed_layers(many)] == ["1", "4", "7", "10"]


def test_hutchinsons_trace_is_that_of_the_hessian(monkeypatch: pytest.MonkeyPatch):
    """Over all patterns of signs the estimate is exact: against the Hessian of the KL divergence, element by element."""
    subject = subject_of(lambda: Tokens(nn.Sequential(nn.Linear(8, 3), nn.GELU(), nn.Linear(3, 3))), 3)
    (batch, _), *_ = subject.batches
    batch = batch[:2]
    signs = iter([torch.tensor(pattern) for pattern in itertools.product([-1.0, 1.0], repeat=3)])
    monkeypatch.setattr("vitq.gradients._signs", lambda like, generator: next(signs).expand_as(like))
    found = operand_traces(replace(subject, batches=[(batch, None)] * 8), lambda _: fisher_probe)
    expected = run(subject.graph.module, batch).log_softmax(1)
    for layer in [layer for layer in subject.graph.layers if layer.name.startswith("body")]:
        for position in range(2):

            def kl(delta: Tensor, layer=layer, position=position) -> Tensor:
                def moved(compute, *arguments):
                    changed = list(arguments)
                    changed[position] = changed[position] + delta
                    return compute(*changed)

                log_p = run(subject.graph.module, batch, {subject.graph.nodes[layer.name]: moved}).log_softmax(1)
                return (expected.exp() * (expected - log_p)).sum()

            shape = weight_of(subject, layer).shape if position else (2, *layer.operands[0].shape[1:])
            hessian = torch.autograd.functional.hessian(kl, torch.zeros(shape))
            assert isinstance(hessian, Tensor)
            exact = float(hessian.reshape(int(np.prod(shape)), -1).diagonal().sum()) / 2
            assert found[layer.name][position] == pytest.approx(exact, rel=1e-3), (layer.name, position)


def test_hawq_multiplies_mean_trace_and_squared_error():
    subject, table = subject_of(), table_of("hawq-v2")
    traces = operand_traces(subject, lambda _: subject.probe)
    inputs = layer_inputs(subject)
    for layer in subject.graph.layers:
        for index, bits in enumerate(BITS):
            if layer.has_weight:
                w = weight_of(subject, layer)
                error = (quantize_weight(w, *weight_ranges(w, bits), bits).dequantize() - w).square().sum()
                assert table.weight[layer.name][index] == pytest.approx(traces[layer.name][1] / w.numel() * float(error), rel=1e-4)
            expected = 0.0
            for operand, values, found in zip(layer.activations, inputs[layer.name], traces[layer.name], strict=False):
                q = fit_operand(subject.histograms[operand.tensor], bits, operand.role)
                expected += found * float((q.quantize_dequantize(values) - values).square().mean())
            assert table.activation[layer.name][index] == pytest.approx(expected, rel=0.05)  # from histograms


def layer_inputs(subject: Subject) -> dict[str, list[Tensor]]:
    """Every layer's activations over all images."""
    found: dict[str, list[Tensor]] = {}

    def watch(layer: Layer):
        def intercept(compute, *arguments):
            found[layer.name] = list(arguments[: len(layer.activations)])
            return compute(*arguments)

        return intercept

    graph = subject.graph
    run(graph.module, torch.cat([batch for batch, _ in subject.batches]), {graph.nodes[layer.name]: watch(layer) for layer in graph.layers})
    return found


# The metrics of local errors


def test_sqnr_is_that_of_each_output():
    subject, table, inputs = subject_of(), table_of("sqnr"), layer_inputs(subject_of())
    for layer in subject.graph.layers:
        for index, bits in enumerate(BITS):
            q = [fit_operand(subject.histograms[operand.tensor], bits, operand.role) for operand in layer.activations]
            read = [p.quantize_dequantize(x) for x, p in zip(inputs[layer.name], q, strict=True)]
            if layer.has_weight:
                w = weight_of(subject, layer)
                dequantized = quantize_weight(w, *weight_ranges(w, bits), bits).dequantize()
                (x,), (x_read,) = inputs[layer.name], read
                y, outputs = x @ w.T, {"tied": x_read @ dequantized.T, "weight": x @ dequantized.T, "activation": x_read @ w.T}
            else:
                y, outputs = torch.matmul(*inputs[layer.name]), {"tied": torch.matmul(*read), "activation": torch.matmul(*read)}
            for kind, output in outputs.items():
                decibels = 10 * torch.log10(y.square().sum() / (output - y).square().sum())
                assert -10 * np.log10(getattr(table, kind)[layer.name][index]) == pytest.approx(float(decibels), abs=0.01)


def test_weight_mse_is_relative_to_each_operand():
    subject, table, inputs = subject_of(), table_of("weight-mse"), layer_inputs(subject_of())
    for layer in subject.graph.layers:
        for index, bits in enumerate(BITS):
            expected = 0.0
            for operand, x in zip(layer.activations, inputs[layer.name], strict=True):
                q = fit_operand(subject.histograms[operand.tensor], bits, operand.role)
                expected += float((q.quantize_dequantize(x) - x).square().sum() / x.square().sum())
            rows = any(operand.role == "post_softmax" for operand in layer.activations)  # which no histogram tells exactly
            assert table.activation[layer.name][index] == pytest.approx(expected, rel=0.3 if rows else 0.05)
            if layer.has_weight:
                w = weight_of(subject, layer)
                error = quantize_weight(w, *weight_ranges(w, bits), bits).dequantize() - w
                assert table.weight[layer.name][index] == pytest.approx(float(error.square().sum() / w.square().sum()), rel=1e-4)


def test_nuclear_norms_are_sums_of_singular_values():
    subject, table = subject_of(), table_of("nuclear")
    inputs, (norms, powers) = layer_inputs(subject), module_norms(subject)
    by_name = {layer.name: layer for layer in subject.graph.layers}
    attention = next(layer for layer in subject.graph.layers if layer.type == "av")
    maps = inputs[attention.name][0]
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)  # after the softmax
    assert norms[module_of(attention)] == pytest.approx(sum_of_roots(maps), rel=1e-3)
    assert powers[attention.name] == pytest.approx(float(inputs[attention.name][1].square().sum() / 8), rel=1e-4)
    mlp = next(layer for layer in subject.graph.layers if layer.type == "fc2")
    outputs = inputs[mlp.name][0] @ weight_of(subject, mlp).T + tensor_of(
        subject.graph.module, argument(subject.graph.layer_node(mlp.name), 2)
    )
    assert norms[module_of(mlp)] == pytest.approx(sum_of_roots(outputs), rel=1e-3)
    shared = [name for name, layer in by_name.items() if module_of(layer) == module_of(mlp)]
    assert {by_name[name].type for name in shared} == {"fc1", "fc2"}
    for name in shared:
        w = weight_of(subject, by_name[name])
        error = (quantize_weight(w, *weight_ranges(w, 4), 4).dequantize() - w).square().sum()
        assert table.weight[name][1] == pytest.approx(norms[module_of(mlp)] * float(error), rel=1e-4)


def sum_of_roots(maps: Tensor) -> float:
    """The mean over matrices of the sum of the square roots of the eigenvalues of M^T M."""
    maps = maps.double()
    return float(torch.linalg.eigvalsh(maps.mT @ maps).clamp(min=0).sqrt().sum(-1).mean())


def test_attention_and_mlp_of_a_real_block_are_modules():
    graph = rewrite(captured("vit")[1])
    modules: dict[str, set[str]] = {}
    for layer in graph.layers:
        modules.setdefault(module_of(layer), set()).add(layer.type)
    assert sorted(map(sorted, modules.values())) == sorted(
        [["patch_embed"], ["head"], *2 * [["av", "proj", "qk", "qkv"]], *2 * [["fc1", "fc2"]]]
    )


# The controls, and what is combined


@pytest.mark.parametrize("average", [2, 4])
def test_the_uniform_control_leaves_the_allocator_at_the_uniform_plan(average: int):
    subject = subject_of()
    profile = Profile(model=SPEC, layers=subject.graph.layers, costs={"uniform": table_of("uniform")}, rest_bytes=0)
    plan = allocate(profile, [f"{average}.0"]).plan
    searched = {entry.activation_bits for entry in plan.layers if entry.type not in ("patch_embed", "head")}
    assert searched == {average}


def test_random_follows_its_seed_alone():
    subject = subject_of()
    assert METRICS["random"](replace(subject, seed=1)) != table_of("random")
    ratios = [table_of("random").tied[name][0] / costs[0] for name, costs in table_of("uniform").tied.items()]
    assert min(ratios) > 0.1 and max(ratios) < 10 and max(ratios) / min(ratios) > 3
    assert table_of("random") == METRICS["random"](replace(subject, batches=[]))  # the images do not enter


def test_relevance_weights_the_sensitivity():
    measured = table_of("sensitivity")
    names = list(measured.tied)
    relevance = {name: float(index + 1) for index, name in enumerate(names)}
    found = combine(measured, relevance)
    smallest = np.mean([costs[0] for costs in measured.tied.values()])
    mean = np.mean(list(relevance.values()))
    for name in names:
        assert np.allclose(found.tied[name], np.array(measured.tied[name]) / smallest * relevance[name] / mean)
        if name in measured.weight:
            assert np.allclose(np.add(found.weight[name], found.activation[name]), found.tied[name])
    assert found.unit == "relative"
    even = combine(measured, dict.fromkeys(names, 3.0))
    assert np.mean([costs[0] for costs in even.tied.values()]) == pytest.approx(1.0)
    indifferent = combine(measured, relevance, eta=0.0)
    assert all(np.allclose(indifferent.tied[name], even.tied[name]) for name in names)
    assert table_of("mix-qvit") == combine(measured, table_of("lrp").importance)
